"""A program that saves, loads and verifies a large state and prints how much memory that took beyond it.

Run as ``peak.py URI GIB MEMORY_LIMIT``; prints three numbers of bytes, for the save, the load and verify.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

import cloudckpt

MIB = 1 << 20


def main(uri: str, gib: float, memory_limit: int) -> None:
    options = {"memory_limit": memory_limit, "concurrency": 4}
    save_and_load(f"{uri}-warm", {"x": torch.ones(4 * MIB)}, options)
    count = int(gib * 1024 / 32)
    state = {f"t{i}": torch.full((8 * MIB,), float(i)) for i in range(count - count // 4)}
    # A quarter is scattered, so that it has to be gathered on the way out and spread on the way in.
    scattered = torch.ones(count // 4, 2 * MIB, 8)
    state["scattered"] = scattered[:, :, ::2]
    saved, loaded = save_and_load(f"{uri}-state", state, options)
    verified = growth(lambda: verify(f"{uri}-state", options))
    sys.stdout.write(f"{saved} {loaded} {verified}\n")


def verify(uri: str, options: dict[str, Any]) -> None:
    found = cloudckpt.verify(uri, **options)
    assert found.ok
    assert not found.unverified


def save_and_load(uri: str, state: dict[str, torch.Tensor], options: dict[str, Any]) -> tuple[int, int]:
    saved = growth(lambda: dcp.save(state, storage_writer=cloudckpt.StorageWriter(uri, **options)))
    expected = {key: float(tensor[-1].flatten()[-1]) for key, tensor in state.items()}
    for tensor in state.values():
        tensor.zero_()
    loaded = growth(lambda: dcp.load(state, storage_reader=cloudckpt.StorageReader(uri, **options)))
    found = {key: float(tensor[-1].flatten()[-1]) for key, tensor in state.items()}
    assert found == expected
    return saved, loaded


def growth(work: Callable[[], object]) -> int:
    """Bytes by which resident memory peaked above where it stood."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
