"""What loading costs on another number of ranks than saved: 4 to 2 and 2 to 4, beside stock DCP over s3fs.

Run as `python -m bench.reshard` with `tests` on the module search path. Ranks are processes of one gloo
group, and each form loads the checkpoint that it saved itself. The first load of each doesn't count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import cloudckpt
from bench.endpoint import Endpoint, served
from bench.growth import reached, table_of, write_markdown
from bench.report import machine
from support.dcp_fsspec import FsspecReader, FsspecWriter
from support.ranks import RankPool
from support.servers import S3Server

_GIB = 1 << 30
_COLUMNS = 4096
"""Of every tensor, four bytes each."""
_DEADLINE = 600.0
"""Seconds for one load or save."""
LAYOUTS: dict[str, int | None] = {"rows": 0, "columns": 1, "replicated": None}
"""The dimension that tensors are sharded along; None where every rank has all of them."""
DIRECTIONS = ((4, 2), (2, 4))
"""Ranks that save, ranks that load."""


@dataclass(frozen=True, slots=True)
class Form:
    """A way to save and to load, given a URI and the server."""

    writer: Callable[[str, S3Server], dcp.StorageWriter]
    reader: Callable[[str, S3Server], dcp.StorageReader]


def _reached_by_s3fs(server: S3Server) -> dict[str, Any]:
    return {"endpoint_url": server.endpoint, **server.storage_options}


FORMS = {
    "cloudckpt": Form(
        lambda uri, server: cloudckpt.StorageWriter(uri, **reached(server)),
        lambda uri, server: cloudckpt.StorageReader(uri, **reached(server)),
    ),
    "each alone": Form(
        lambda uri, server: cloudckpt.StorageWriter(uri, **reached(server)),
        lambda uri, server: cloudckpt.StorageReader(uri, share=False, **reached(server)),
    ),
    "s3fs": Form(
        lambda uri, server: FsspecWriter(uri, sync_files=False, **_reached_by_s3fs(server)),
        lambda uri, server: FsspecReader(uri, **_reached_by_s3fs(server)),
    ),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One load by all ranks."""

    wall: float
    """Seconds, of the slowest rank."""
    cpu: float
    """Seconds, of all ranks together."""
    requests: int
    sent: int
    """Bytes that the endpoint sent."""
    wanted: int
    """Bytes of the tensors that were loaded into, on all ranks; what is replicated counts on each."""


@dataclass(frozen=True, slots=True)
class Load:
    """What loading a layout in one form came to."""

    layout: str
    saved_by: int
    loaded_by: int
    form: str
    stored: int
    """Bytes of the checkpoint's tensors."""
    samples: Sequence[Sample]

    @property
    def figures(self) -> dict[str, float]:
        """Those of the sample whose CPU time is the median."""
        sample = sorted(self.samples, key=lambda sample: sample.cpu)[len(self.samples) // 2]
        return {
            "wall": sample.wall,
            "cpu_per_gib": sample.cpu / sample.wanted * _GIB,
            "requests": sample.requests,
            "read_amplification": sample.sent / sample.wanted,
            "read_of_checkpoint": sample.sent / self.stored,
        }


@dataclass(frozen=True, slots=True)
class Task:
    """A checkpoint, and who saves or loads it; travels to the ranks."""

    form: str
    uri: str
    server: S3Server
    layout: str
    tensors: int
    rows: int
    """Of each whole tensor."""

    def writer(self) -> dcp.StorageWriter:
        return FORMS[self.form].writer(self.uri, self.server)

    def reader(self) -> dcp.StorageReader:
        return FORMS[self.form].reader(self.uri, self.server)

    def local_state(self) -> dict[str, Any]:
        """This rank's share of a state whose content follows from where it is."""
        dim, ranks = LAYOUTS[self.layout], dist.get_world_size()
        mesh = init_device_mesh("cpu", (ranks,))
        state: dict[str, Any] = {}
        for number in range(self.tensors):
            whole = (torch.arange(self.rows * _COLUMNS, dtype=torch.int32) + number).view(-1, _COLUMNS)
            if dim is None:
                state[f"t{number}"] = whole
            else:
                own = whole.chunk(ranks, dim)[dist.get_rank()].contiguous()
                state[f"t{number}"] = DTensor.from_local(own, mesh, [Shard(dim)])
        return state


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save(_: int, task: Task) -> None:
    """Save from every rank."""
    dcp.save(task.local_state(), storage_writer=task.writer())


def load(_: int, task: Task) -> tuple[float, float, int]:
    """Load on every rank, into warm memory: seconds, CPU seconds, and bytes that were wanted."""
    state = task.local_state()
    for tensor in state.values():
        _own(tensor).fill_(-1)
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    dcp.load(state, storage_reader=task.reader())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    for name, expected in task.local_state().items():
        assert torch.equal(_own(state[name]), _own(expected)), f"{task.form} loaded {name} wrong"
    return wall, cpu, sum(_own(tensor).nbytes for tensor in state.values())


def measured(
    endpoint: Endpoint, pools: dict[int, RankPool], tensors: int, rows: int, repeats: int
) -> list[Load]:
    """Every layout, in both directions, by every form in turn."""
    server, loads = endpoint.server, list[Load]()
    for layout, (savers, loaders) in itertools.product(LAYOUTS, DIRECTIONS):
        bucket = server.new_bucket()
        tasks = [
            Task(form, f"s3://{bucket}/{number}", server, layout, tensors, rows)
            for number, form in enumerate(FORMS)
        ]
        for task in tasks:
            pools[savers](save, task, deadline=_DEADLINE)
        samples: defaultdict[str, list[Sample]] = defaultdict(list)
        for _, task in itertools.product(range(1 + repeats), tasks):
            endpoint.reset()
            ranks = pools[loaders](load, task, deadline=_DEADLINE)
            counts = endpoint.counts()
            walls, cpus, wanted = zip(*ranks, strict=True)
            requests = sum(counts.requests.values())
            samples[task.form].append(Sample(max(walls), math.fsum(cpus), requests, counts.sent, sum(wanted)))
        stored = tensors * rows * _COLUMNS * 4
        loads += [Load(layout, savers, loaders, form, stored, samples[form][1:]) for form in FORMS]
        _empty(server, bucket)
    return loads


def _empty(server: S3Server, bucket: str) -> None:
    """Let the endpoint's memory go."""
    client = server.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for entry in page.get("Contents", []):
            client.delete_object(Bucket=bucket, Key=entry.get("Key", ""))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = _parser().parse_args(arguments)
    rows = max(4, round(options.mib * (1 << 20) / options.tensors / _COLUMNS / 4) // 4 * 4)
    facts, console = machine(Path.cwd()), Console()
    with served() as endpoint, RankPool(2) as two, RankPool(4) as four:
        loads = measured(endpoint, {2: two, 4: four}, options.tensors, rows, options.repeats)
    table = table_for(loads, f"{options.tensors} tensors of {rows} x {_COLUMNS} x 4 bytes")
    console.print(table)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    found = [{**asdict(one), "figures": one.figures} for one in loads]
    options.json.write_text(json.dumps({"machine": facts, "loads": found}, indent=1) + "\n")
    if options.markdown is not None:
        write_markdown(options.markdown, [table])
    return 0


def table_for(loads: Sequence[Load], state: str) -> Table:
    """One row a load."""
    return table_of(
        f"Loading on another number of ranks: {state}",
        "sharded: ranks: by: wall_s:.2f CPU_s_/GiB:.2f requests:, read_/wanted:.3f read_/stored:.3f",
        [
            (one.layout, f"{one.saved_by} to {one.loaded_by}", one.form, *one.figures.values())
            for one in loads
        ],
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.reshard", description=__doc__)
    parser.add_argument("--mib", type=float, default=512, help="size of the checkpoint (default: 512)")
    parser.add_argument("--tensors", type=int, default=16, help="in it (default: 16)")
    parser.add_argument("--repeats", type=int, default=3, help="loads that count (default: 3)")
    parser.add_argument("--json", type=Path, default=Path("build/bench/reshard.json"))
    parser.add_argument("--markdown", type=Path, help="a file for the table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
