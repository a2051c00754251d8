"""What it costs to save from a CUDA device and to load to one, beside the same in host memory.

Run as `python -m bench.device` with `tests` on the module search path, where there is a device. Every form
saves and loads the same bytes through DCP on an S3 server in memory, by turns; the first turn of each
doesn't count. `pages not locked` is cloudckpt without locked pages; `stock, to a folder` is DCP's own
writer and reader of files, which have no server at the other end.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console

import cloudckpt
from bench.endpoint import served
from bench.growth import reached
from bench.report import machine
from bench.turns import Form, parser, run
from support.servers import S3Server

_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory; the folder in it gets a name of its own


def forms(server: S3Server, folder: Path) -> dict[str, Form]:
    """All that are compared, each in a bucket of its own or in a folder."""

    def ours(device: str, within: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Form:
        bucket = server.new_bucket()
        return Form(
            lambda _: cloudckpt.StorageWriter(f"s3://{bucket}/checkpoint", overwrite=True, **reached(server)),
            lambda _: cloudckpt.StorageReader(f"s3://{bucket}/checkpoint", **reached(server)),
            device,
            within,
        )

    return {
        "cloudckpt": ours("cuda"),
        "pages not locked": ours("cuda", _no_locks),
        "in host memory": ours("cpu"),
        "stock, to a folder": Form(
            lambda _: dcp.FileSystemWriter(folder), lambda _: dcp.FileSystemReader(folder), "cuda"
        ),
    }


def _no_locks() -> AbstractContextManager[Any]:
    return mock.patch("cloudckpt.backends.transfer.buffer_pool.lock_pages", return_value=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 2 where there is no device."""
    options = parser("device", __doc__, gib=2.0, small=20_000, repeats=5).parse_args(arguments)
    console = Console()
    if not torch.cuda.is_available():
        console.print("There is no CUDA device here.")
        return 2
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as name, served() as endpoint:
        facts = machine(Path(name))
        console.print(f"{facts['device']}, {facts['cores']} cores ({facts['processor']})", markup=False)
        run(lambda: forms(endpoint.server, Path(name)), options, facts, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
