"""A program that converts a large state from one form to the next and prints how much memory that took.

Run as ``peak_convert.py FOLDER MIB MEMORY_LIMIT``; prints a number of bytes for each conversion.
"""

from __future__ import annotations

import functools
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from support.peak import MIB, growth

STEPS = (
    ("ckpt", "model.pt", None),
    ("model.pt", "again", None),
    ("again", "hf", "safetensors"),
    ("hf", "last", None),
    ("again", "turned.safetensors", None),
)
"""Source, destination, and kind where the name does not say it."""


def main(folder: str, mib: int, memory_limit: int) -> None:
    uri, query = f"file://{folder}", f"?memory_limit={memory_limit}&concurrency=4&part_size=64MiB"
    save(f"{uri}/warm-ckpt", 8, memory_limit)
    for source, destination, to in STEPS:
        cloudckpt.convert(f"{uri}/warm-{source}", f"{uri}/warm-{destination}", to=to)
    save(f"{uri}/ckpt", mib, memory_limit)
    peaks: list[int] = []
    for source, destination, to in STEPS:
        ends = f"{uri}/{source}{query}", f"{uri}/{destination}{query}"
        converting = functools.partial(cloudckpt.convert, *ends, to=to, shard_size=mib * MIB // 3)
        peaks.append(growth(converting))
    sys.stdout.write(" ".join(map(str, peaks)))


def save(uri: str, mib: int, memory_limit: int) -> None:
    """Half of it one tensor, larger than the limit, a quarter turned, a quarter of many small ones."""
    state = {
        "large": torch.ones(mib // 2, MIB // 4),
        "turned": torch.ones(MIB // 64, mib * 4).t(),
        **{f"small.{n}": torch.full((MIB // 16,), float(n)) for n in range(mib)},
    }
    dcp.save(state, storage_writer=cloudckpt.StorageWriter(uri, memory_limit=memory_limit))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
