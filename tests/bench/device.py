"""What it costs to save from a CUDA device and to load to one, beside the same in host memory.

Run as `python -m bench.device` with `tests` on the module search path, where there is a device. Every form
saves and loads the same bytes through DCP on an S3 server in memory, by turns; the first turn of each
doesn't count. `pages not locked` is cloudckpt without locked pages; `stock, to a folder` is DCP's own
writer and reader of files, which have no server at the other end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table

import cloudckpt
from bench.endpoint import served
from bench.growth import reached
from bench.report import machine
from support.servers import S3Server

_GIB = 1 << 30
_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory; the folder in it gets a name of its own
State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Form:
    """A way to save and to load, and where the tensors are."""

    device: str
    writer: Callable[[str], dcp.StorageWriter]
    reader: Callable[[str], dcp.StorageReader]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True, slots=True)
class Sample:
    """One save or load."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds of this process."""


def forms(server: S3Server, folder: Path) -> dict[str, Form]:
    """All that are compared; names of checkpoints become objects of a bucket each, or folders."""

    def ours(device: str, within: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Form:
        bucket = server.new_bucket()
        return Form(
            device,
            lambda name: cloudckpt.StorageWriter(f"s3://{bucket}/{name}", overwrite=True, **reached(server)),
            lambda name: cloudckpt.StorageReader(f"s3://{bucket}/{name}", **reached(server)),
            within,
        )

    return {
        "cloudckpt": ours("cuda"),
        "pages not locked": ours("cuda", _no_locks),
        "in host memory": ours("cpu"),
        "stock, to a folder": Form(
            "cuda",
            lambda name: dcp.FileSystemWriter(folder / name),
            lambda name: dcp.FileSystemReader(folder / name),
        ),
    }


def _no_locks() -> AbstractContextManager[Any]:
    return mock.patch("cloudckpt.backends.scratch.lock_pages", return_value=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 2 where there is no device."""
    options = _parser().parse_args(arguments)
    console = Console()
    if not torch.cuda.is_available():
        console.print("There is no CUDA device here.")
        return 2
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    sizes = {
        f"{options.gib:g} GiB in 32 MiB tensors": (round(options.gib * 32), 8 << 20),
        f"{options.small} x 16 KiB": (options.small, 4096),
    }
    written: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as name, served() as endpoint:
        folder = Path(name)
        written["machine"] = facts = machine(folder)
        console.print(f"{facts['device']}, {facts['cores']} cores ({facts['processor']})", markup=False)
        for title, (tensors, elements) in sizes.items():
            samples = _measured(forms(endpoint.server, folder), tensors, elements, options.repeats)
            console.print(_table(title, samples, 4 * tensors * elements / _GIB))
            written[title] = {
                form: {way: [asdict(one) for one in taken] for way, taken in ways.items()}
                for form, ways in samples.items()
            }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(written, indent=1) + "\n")
    return 0


def _measured(
    taking_part: dict[str, Form], tensors: int, elements: int, repeats: int
) -> dict[str, dict[str, list[Sample]]]:
    saved: dict[str, State] = {}
    for device in ("cuda", "cpu"):
        saved[device] = {f"t{i}": torch.rand(elements, device=device) for i in range(tensors)}
    samples: dict[str, dict[str, list[Sample]]] = {form: {"save": [], "load": []} for form in taking_part}
    for repeat in range(1 + repeats):
        for name, form in taking_part.items():
            state = saved[form.device]
            loaded = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
            with form.within():
                writer, reader = form.writer("checkpoint"), form.reader("checkpoint")
                saving = _timed(lambda: dcp.save(state, storage_writer=writer, no_dist=True))  # noqa: B023
                loading = _timed(lambda: dcp.load(loaded, storage_reader=reader, no_dist=True))  # noqa: B023
            assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items()), name
            if repeat:
                samples[name]["save"].append(saving)
                samples[name]["load"].append(loading)
    return samples


def _timed(task: Callable[[], object]) -> Sample:
    torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    task()
    torch.cuda.synchronize()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


def _table(title: str, samples: dict[str, dict[str, list[Sample]]], gib: float) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("", "save s", "CPU s/GiB", "load s", "CPU s/GiB"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for form, ways in samples.items():
        cells: list[str] = []
        for way in ("save", "load"):
            cells.append(f"{statistics.median(one.wall for one in ways[way]):.2f}")
            cells.append(f"{statistics.median(one.cpu for one in ways[way]) / gib:.2f}")
        table.add_row(form, *cells)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.device", description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the large state (default: 2)")
    parser.add_argument("--small", type=int, default=20_000, help="16 KiB tensors (default: 20000)")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count (default: 5)")
    parser.add_argument("--json", type=Path, default=Path("build/bench/device.json"), help="every sample")
    return parser


if __name__ == "__main__":
    sys.exit(main())
