"""What checksums cost: CPU seconds a GiB of saving and of loading, with and without, in one run.

Run as `python -m bench.integrity` with `tests` on the module search path. Only this process's CPU time is
counted; the S3 server at the other end is a process of its own. With checksums means with the default
options: the server is given those of the parts, too. Single samples scatter widely on a busy machine, so
there are many small ones, in pairs, and the median of the differences is what counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table

import cloudckpt
from bench.endpoint import served
from cloudckpt.backends.checksums import CRC32C
from support.servers import S3Server

_TENSOR = 32 << 20
_WITH, _WITHOUT = "with", "without"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="bench.integrity", description=__doc__)
    parser.add_argument("--gib", type=float, default=0.5, help="size of the state")
    parser.add_argument(
        "--repeats", type=int, default=40, help="saves and loads of each kind that are counted"
    )
    parser.add_argument("--json", type=Path, default=Path("build/bench/integrity.json"))
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    count = max(1, round(options.gib * (1 << 30) / _TENSOR))
    state = {f"t{i}": torch.full((_TENSOR // 4,), float(i)) for i in range(count)}
    with served() as endpoint:
        server = endpoint.server
        samples = _measured(state, server.new_bucket(), _reached(server), options.repeats)
    gib = count * _TENSOR / (1 << 30)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"gib": gib, "cpu_seconds": samples}, indent=1) + "\n")
    _show(samples, gib)
    return 0


def _reached(server: S3Server) -> dict[str, Any]:
    return {
        "endpoint_url": server.endpoint,
        "region": "us-east-1",
        "storage_options": server.storage_options,
    }


def _measured(
    state: dict[str, torch.Tensor], bucket: str, options: dict[str, Any], repeats: int
) -> dict[str, dict[str, list[float]]]:
    samples: dict[str, dict[str, list[float]]] = {"save": {}, "load": {}}
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for repeat in range(repeats + 1):
        for kind in (_WITH, _WITHOUT) if repeat % 2 else (_WITHOUT, _WITH):  # neither always goes first
            uri = f"s3://{bucket}/{kind}"
            given: dict[str, Any] = options if kind == _WITH else {**options, "checksum": "none"}
            writer = cloudckpt.StorageWriter(uri, overwrite=True, **given)
            reader = cloudckpt.StorageReader(uri, **given)
            with contextlib.nullcontext() if kind == _WITH else _no_checksums():
                saving = _cpu(lambda: dcp.save(state, storage_writer=writer))  # noqa: B023 - called at once
                loading = _cpu(lambda: dcp.load(loaded, storage_reader=reader))  # noqa: B023
            if repeat:  # the first of each warms up
                samples["save"].setdefault(kind, []).append(saving)
                samples["load"].setdefault(kind, []).append(loading)
    return samples


def _cpu(task: Callable[[], object]) -> float:
    began = time.process_time()
    task()
    return time.process_time() - began


@contextlib.contextmanager
def _no_checksums() -> Iterator[None]:
    """Take no checksum while saving, and compare none while loading."""
    nothing = replace(CRC32C, of=lambda *_: 0, _combine=lambda *_: 0)
    with (
        mock.patch("cloudckpt.backends.save.uploader.algorithm_for", return_value=nothing),
        mock.patch("cloudckpt.backends.transfer.upload_checksums._cut", return_value=iter(())),
        mock.patch("cloudckpt.backends.format.metadata.checks_of", return_value=None),
        mock.patch("cloudckpt.backends.save.object_plan.joined", lambda _, spans, __: (b"" for _ in spans)),
    ):
        yield


def _spread(values: Sequence[float]) -> str:
    """The middle half of the values, where there are enough for one."""
    if len(values) < 4:
        return "?"
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:+.2f} to {high:+.2f}"


def _show(samples: dict[str, dict[str, list[float]]], gib: float) -> None:
    table = Table(title=f"CPU seconds a GiB, medians; {gib:g} GiB in 32 MiB tensors, S3 over loopback")
    for column in ("", _WITH, _WITHOUT, "checksums cost"):
        table.add_column(column, justify="right")
    for what, kinds in samples.items():
        cost = {kind: statistics.median(values) / gib for kind, values in kinds.items()}
        pairs = zip(kinds[_WITH], kinds[_WITHOUT], strict=True)
        differences = [(one - other) / gib for one, other in pairs]
        middle, spread = statistics.median(differences), _spread(differences)
        table.add_row(
            what,
            f"{cost[_WITH]:.3f}",
            f"{cost[_WITHOUT]:.3f}",
            f"{middle:+.3f} (half of them within {spread})",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
