"""How the ranks of one host share its network: each saves and loads its own tensors, at the same time.

Run as `python -m bench.ranks` with `tests` on the module search path. The ranks are one job, and save one
checkpoint to the S3 server of `bench.endpoint`, far away, behind a link that limits the host. A rank's time
is that of its `write_data` or `read_data`, so what DCP does before and after is not in it. The first turn
doesn't count.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich import box
from rich.console import Console
from rich.table import Table

import cloudckpt
from bench.contest import scratch
from bench.distance import add_options, distant, from_options
from bench.endpoint import served
from bench.report import machine
from support.hosts import enter
from support.ranks import RankPool
from support.servers import NotInstalledError

_TENSOR = 32 << 20
_DEADLINE = 900.0


@dataclass(frozen=True, slots=True)
class Job:
    """What every rank does."""

    uri: str
    options: Mapping[str, Any]
    environment: Mapping[str, str]
    namespace: str | None
    ranks: int
    tensors: int
    turns: int


@dataclass(frozen=True, slots=True)
class Span:
    """When one rank's bytes were on the way, by the clock that all ranks of the host share."""

    start: float
    end: float
    cpu_seconds: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Turn:
    """One save or load by all ranks."""

    spans: Sequence[Span]
    nbytes: int
    """Of one rank."""

    @property
    def together(self) -> float:
        """Bytes a second of all ranks, from the first byte of the first to the last byte of the last."""
        first, last = min(span.start for span in self.spans), max(span.end for span in self.spans)
        return self.nbytes * len(self.spans) / (last - first)

    @property
    def unfairness(self) -> float:
        """How much longer the slowest rank takes than the median one."""
        seconds = [span.seconds for span in self.spans]
        return max(seconds) / statistics.median(seconds) - 1

    @property
    def cpu_per_gib(self) -> float:
        return sum(span.cpu_seconds for span in self.spans) / (self.nbytes * len(self.spans) / (1 << 30))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextmanager
def _timed(storage: Any, method: str, spans: list[Span]) -> Iterator[None]:
    """Note when a call of the storage's method was on the way."""
    call: Callable[..., Any] = getattr(storage, method)

    def timed(*arguments: Any) -> Any:
        start, cpu = time.monotonic(), _cpu_seconds()
        future = call(*arguments)
        future.wait()
        spans.append(Span(start, time.monotonic(), _cpu_seconds() - cpu))
        return future

    setattr(storage, method, timed)
    yield


def run_rank(rank: int, job: Job) -> tuple[list[Span], list[Span]]:
    """Save and load as one rank of the job; return the spans of the saves and of the loads."""
    os.environ.update(job.environment)
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(job.ranks))
    if job.namespace is not None:
        enter(job.namespace)
    torch.manual_seed(rank)
    state = {f"rank-{rank}-{number}": torch.rand(_TENSOR // 4) for number in range(job.tensors)}
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    saves, loads = list[Span](), list[Span]()
    for turn in range(job.turns):
        for tensor in loaded.values():
            tensor.zero_()
        dist.barrier()
        writer = cloudckpt.StorageWriter(f"{job.uri}/turn-{turn}", **job.options)
        with _timed(writer, "write_data", saves):
            dcp.save(state, storage_writer=writer)
        dist.barrier()
        reader = cloudckpt.StorageReader(f"{job.uri}/turn-{turn}", **job.options)
        with _timed(reader, "read_data", loads):
            dcp.load(loaded, storage_reader=reader)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items()), rank
    return saves[1:], loads[1:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = _parser().parse_args(arguments)
    distance = from_options(options)
    console = Console()
    tensors = max(1, options.mib * (1 << 20) // _TENSOR)
    try:
        with scratch(None) as folder, served() as near, distant(near, distance) as reached:
            facts = machine(folder)
            job = Job(
                f"s3://{near.server.new_bucket()}",
                {
                    "endpoint_url": reached.endpoint,
                    "region": "us-east-1",
                    "storage_options": near.server.storage_options,
                },
                reached.environment,
                reached.namespace,
                options.ranks,
                tensors,
                1 + options.repeats,
            )
            with RankPool(options.ranks) as pool:
                spans = pool(run_rank, job, deadline=_DEADLINE)
    except (NotInstalledError, PermissionError) as error:
        console.print(f"(!) {distance.title}: not measured: {error}", markup=False)
        return 0
    nbytes = tensors * _TENSOR
    turns = {
        what: [
            Turn(list(of_a_turn), nbytes) for of_a_turn in zip(*(rank[way] for rank in spans), strict=True)
        ]
        for way, what in enumerate(("save", "load"))
    }
    console.print(f"{facts['cores']} cores ({facts['processor']}), load {facts['load']:.1f}", markup=False)
    console.print(
        _table(f"{options.ranks} ranks of {nbytes >> 20} MiB, {distance.title}", turns, options.host_rate_mb)
    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    written = {what: [asdict(turn) for turn in taken] for what, taken in turns.items()}
    options.json.write_text(json.dumps({"machine": facts, **written}, indent=1) + "\n")
    return 0


def _table(title: str, turns: Mapping[str, Sequence[Turn]], limit: float | None) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "MB/s together", "of the host's limit", "slowest to the median", "CPU s/GiB"):
        table.add_column(column, justify="right" if column else "left")
    for what, taken in turns.items():
        together, unfair, cpu = (
            statistics.median(values)
            for values in zip(
                *((one.together, one.unfairness, one.cpu_per_gib) for one in taken), strict=True
            )
        )
        share = "-" if limit is None else f"{together / 1e6 / limit:.0%}"
        table.add_row(what, f"{together / 1e6:.0f}", share, f"+{unfair:.0%}", f"{cpu:.2f}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.ranks", description=__doc__)
    add_options(parser)
    parser.set_defaults(rtt_ms=30.0, rate_mb=90.0, host_rate_mb=400.0)
    parser.add_argument("--ranks", type=int, default=8, help="of the host (default: 8)")
    parser.add_argument("--mib", type=int, default=256, help="size of each rank's state (default: 256)")
    parser.add_argument("--repeats", type=int, default=3, help="turns that count (default: 3)")
    parser.add_argument("--json", type=Path, default=Path("build/bench/ranks.json"), help="every sample")
    return parser


if __name__ == "__main__":
    sys.exit(main())
