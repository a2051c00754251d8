"""Costs that grow: a save with its size, and the coordinator's `finish` with the number of ranks.

Run as `python -m bench.growth` with `tests` on the module search path. The coordinator is measured alone: the
ranks are plans of shards, and their write results are what `write_data` returns for them, uploads included.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import itertools
import json
import pickle
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from rich import box
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

import cloudckpt
from bench.endpoint import Endpoint, served
from bench.report import machine
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.save import commit, object_layout, object_plan
from cloudckpt.backends.stores.base import ObjectInfo
from support import peak
from support.servers import S3Server

_MIB, _GIB = 1 << 20, 1 << 30
_TENSOR = 32 << 20
"""Bytes of each tensor of a save that grows."""
_SHARD = torch.arange(64.0).reshape(4, 16)
"""A rank's chunk of every tensor: few bytes, for what is measured grows with their number."""
_OBJECTS = 3
"""Of each rank."""
_LIMIT = 30.0
"""Seconds that `finish` may take for the most ranks."""
_PARAMETERS = (
    *(f"attention.{name}.weight" for name in ("wq", "wk", "wv", "wo")),
    *(f"feed_forward.{name}.weight" for name in ("w1", "w2", "w3")),
    *("attention_norm.weight", "ffn_norm.weight"),
)


@dataclass(slots=True)
class Cost:
    """Seconds of the clock, and of this process on its processors."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def of(self) -> Iterator[None]:
        """Take what the body costs."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall, self.cpu = time.perf_counter() - wall, time.process_time() - cpu


@dataclass(slots=True)
class Finish:
    """What `finish` cost, and which part of it took how much; the rest is checking, and the marker."""

    whole: Cost = field(default_factory=Cost)
    completing: Cost = field(default_factory=Cost)
    describing: Cost = field(default_factory=Cost)
    """Making `.metadata` and serialising it."""
    putting: Cost = field(default_factory=Cost)
    metadata_bytes: int = 0


class MeasuredWriter(cloudckpt.StorageWriter):
    """A writer that notes what its ``finish`` costs."""

    def __init__(self, uri: str, **options: Any) -> None:
        super().__init__(uri, **options)
        self.costs = Finish()

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        publish, put = commit.publish, commit.put_metadata

        def publish_measured(*args: Any) -> Any:
            with self.costs.completing.of():
                return publish(*args)

        def put_measured(*args: Any) -> None:
            with self.costs.putting.of():
                put(*args)

        with (
            mock.patch.object(commit, "publish", publish_measured),
            mock.patch.object(commit, "put_metadata", put_measured),
            self.costs.whole.of(),
        ):
            super().finish(metadata, results)

    def _described(
        self, metadata: Metadata, items: dict[MetadataIndex, _StorageInfo], objects: dict[str, ObjectInfo]
    ) -> bytes:
        with self.costs.describing.of():
            data = super()._described(metadata, items, objects)
        self.costs.metadata_bytes = len(data)
        return data


@dataclass(frozen=True, slots=True)
class SaveFigures:
    """A save of a state by one process: of several, the one whose CPU time is their median."""

    gib: float
    tensors: int
    saving: Cost
    finish: Finish
    requests: int


@dataclass(frozen=True, slots=True)
class FinishFigures:
    """A `finish` with the results of so many ranks, and a reading of the `.metadata` that it made."""

    ranks: int
    items: int
    objects: int
    requests: int
    finish: Finish
    server_cpu: float
    extra_bytes: int
    """By which resident memory peaked above where it stood."""
    reading: Cost


class _Planner(DefaultSavePlanner):
    """Finds every shard of every rank in the same memory."""

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return _SHARD


def tensor_names(count: int) -> list[str]:
    """Names of a transformer's parameters and of the two moments that AdamW keeps of each."""
    parameters = (f"layers.{layer}.{name}" for layer in itertools.count() for name in _PARAMETERS)
    names = (
        name
        for parameter in parameters
        for name in (
            f"model.{parameter}",
            f"optimizer.state.{parameter}.exp_avg",
            f"optimizer.state.{parameter}.exp_avg_sq",
        )
    )
    return list(itertools.islice(names, count))


def rank_plan(rank: int, ranks: int, names: Sequence[str]) -> SavePlan:
    """What DCP plans on one rank for tensors that all ranks share out by rows, as FSDP does."""
    rows, columns = _SHARD.shape
    offsets, size = (rank * rows, 0), (ranks * rows, columns)
    return SavePlan(
        [
            WriteItem(
                MetadataIndex(name, offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(offsets), _SHARD.shape),
                    TensorProperties.create_from_tensor(_SHARD),
                    torch.Size(size),
                ),
            )
            for name in names
        ]
    )


def planned(ranks: int, names: Sequence[str]) -> tuple[list[SavePlan], Metadata]:
    """Every rank's plan, and the metadata that the coordinator makes of them."""
    plans = [_gathered(rank_plan(rank, ranks, names)) for rank in range(ranks)]
    plans, metadata = create_default_global_save_plan(plans)
    return plans, dataclasses.replace(metadata, planner_data={name: tuple(name.split(".")) for name in names})


def written(writer: cloudckpt.StorageWriter, plans: Sequence[SavePlan]) -> list[list[WriteResult]]:
    """Have a writer be each rank in turn, send that rank's objects, and leave their uploads open."""
    writer.set_up_storage_writer(is_coordinator=True, rank=0)
    writer.prepare_global_plan(list(plans))
    spread, planner, encoded = (
        object_layout.distribute,
        _Planner(),
        object_plan._encoded(plans[0].items[0], _Planner()),
    )
    results: list[list[WriteResult]] = []
    with (
        # Shards this small would all go into one object.
        mock.patch.object(object_layout, "distribute", lambda items, *_: spread(items, 1, _OBJECTS)),
        # They are all the same bytes.
        mock.patch.object(object_plan, "_encoded", return_value=encoded),
    ):
        for rank, plan in enumerate(plans):
            writer._rank = rank
            results.append(_gathered(writer.write_data(plan, planner).value()))
    writer._rank = 0
    return results


def _gathered(what: Any) -> Any:
    """As the coordinator gets it from a rank: nothing in it is shared with what other ranks sent."""
    return pickle.loads(pickle.dumps(what))


def measured_finish(endpoint: Endpoint, bucket: str, ranks: int, names: Sequence[str]) -> FinishFigures:
    """Commit what so many ranks wrote, and read the metadata."""
    uri, options = f"s3://{bucket}/ranks-{ranks}", reached(endpoint.server)
    writer = MeasuredWriter(uri, **options)
    gc.disable()  # else it would look again and again at all that was made
    plans, metadata = planned(ranks, names)
    results = written(writer, plans)
    del plans
    gc.enable()
    gc.collect()
    endpoint.reset()
    extra = peak.growth(functools.partial(writer.finish, metadata, results))
    counts = endpoint.counts()
    items = sum(map(len, results)) - ranks  # each rank's report is no item
    del metadata, results
    gc.collect()
    reading = Cost()
    with reading.of():
        read = cloudckpt.StorageReader(uri, **options).read_metadata()
    assert len(read.storage_data) == items == ranks * len(names)
    return FinishFigures(
        ranks=ranks,
        items=items,
        objects=len(md.objects_of(read)),
        requests=sum(counts.requests.values()),
        finish=writer.costs,
        server_cpu=counts.cpu_seconds,
        extra_bytes=extra,
        reading=reading,
    )


def measured_save(
    endpoint: Endpoint, bucket: str, tensors: int, storage: torch.Tensor, repeats: int
) -> SaveFigures:
    """Save a state of so many tensors, which all lie in the same warm memory."""
    state = {f"t{i}": storage.view(-1) for i in range(tensors)}
    samples: list[SaveFigures] = []
    for repeat in range(repeats):
        writer = MeasuredWriter(f"s3://{bucket}/tensors-{tensors}-{repeat}", **reached(endpoint.server))
        saving = Cost()
        endpoint.reset()
        with saving.of():
            dcp.save(state, storage_writer=writer)
        requests = sum(endpoint.counts().requests.values())
        samples.append(SaveFigures(tensors * storage.nbytes / _GIB, tensors, saving, writer.costs, requests))
    return sorted(samples, key=lambda sample: sample.saving.cpu)[repeats // 2]


def reached(server: S3Server) -> dict[str, Any]:
    return {
        "endpoint_url": server.endpoint,
        "region": "us-east-1",
        "storage_options": server.storage_options,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    facts, console = machine(Path.cwd()), Console()
    with served(discard=True) as endpoint:
        storage = torch.ones(_TENSOR // 4)
        measured_save(endpoint, endpoint.server.new_bucket(), 1, storage, 1)  # warms up
        bucket = endpoint.server.new_bucket()
        counts = [max(1, round(gib * _GIB / _TENSOR)) for gib in options.gib]
        saves = [measured_save(endpoint, bucket, n, storage, options.repeats) for n in counts]
    names = tensor_names(options.tensors)
    with served(discard=False) as endpoint:
        measured_finish(endpoint, endpoint.server.new_bucket(), 1, names)  # warms up
        bucket = endpoint.server.new_bucket()
        finishes = [measured_finish(endpoint, bucket, ranks, names) for ranks in options.ranks]
    tables = [save_table(saves), *finish_tables(finishes)]
    most = max(finishes, key=lambda figures: figures.ranks)
    verdict = f"{most.ranks:,} ranks: {most.finish.whole.wall:.1f} s, of {_LIMIT:.0f} s that 4,096 may take."
    for table in tables:
        console.print(table)
    console.print(verdict)
    found = {"machine": facts, "tensors_of_a_rank": len(names), "saves": saves, "finishes": finishes}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1, default=dataclasses.asdict) + "\n")
    if options.markdown is not None:
        write_markdown(options.markdown, tables, verdict)
    return 0


def save_table(saves: Sequence[SaveFigures]) -> Table:
    """What grows with the size of a state."""
    rows: list[Sequence[float]] = []
    for one in saves:
        saving, finish = one.saving, one.finish.whole
        costs = (saving.wall, saving.cpu, saving.cpu / one.gib, one.requests)
        rows.append((one.gib, one.tensors, *costs, finish.wall * 1e3, finish.cpu * 1e3))
    return table_of(
        f"A save by one process: tensors of {_TENSOR >> 20} MiB, all in the same memory; bodies discarded",
        "GiB:g tensors:, wall_s:.2f CPU_s:.2f CPU_s_/GiB:.3f requests:, finish_ms:.0f its_CPU:.0f",
        rows,
    )


def finish_tables(finishes: Sequence[FinishFigures]) -> tuple[Table, Table]:
    """What grows with the number of ranks."""
    committing: list[Sequence[float]] = []
    described: list[Sequence[float]] = []
    for one in finishes:
        finish, reading, nbytes = one.finish, one.reading, one.finish.metadata_bytes
        whole, parts = finish.whole, (finish.completing.cpu, finish.describing.cpu)
        counts = (one.ranks, one.objects, one.requests)
        committing.append((*counts, whole.wall, whole.cpu, *parts, whole.wall / one.ranks * 1e3))
        sizes = (one.ranks, one.items, nbytes / _MIB, nbytes / one.items, one.extra_bytes / _MIB)
        described.append((*sizes, reading.wall, reading.cpu, reading.cpu / one.items * 1e6))
    return (
        table_of(
            "The coordinator's finish alone; CPU seconds in all, for uploads, and for the metadata",
            "ranks:, objects:, requests:, wall_s:.2f CPU_s:.2f uploads:.2f metadata:.2f wall_ms_/rank:.2f",
            committing,
        ),
        table_of(
            "The .metadata that it makes, the memory that it takes beyond what was there, and reading it",
            "ranks:, items:, MiB:.1f bytes_/item:.0f extra_MiB:.0f read_s:.2f CPU_s:.2f CPU_us_/item:.1f",
            described,
        ),
    )


def table_of(title: str, columns: str, rows: Sequence[Sequence[float | str]]) -> Table:
    """A table of figures; ``columns`` are headings with the format of what stands below."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    headings, formats = zip(*(column.rsplit(":", 1) for column in columns.split()), strict=True)
    for heading, form in zip(headings, formats, strict=True):
        table.add_column(heading.replace("_", " "), justify="right" if form else "left", no_wrap=not form)
    for row in rows:
        table.add_row(*map(format, row, formats))
    return table


def write_markdown(file: Path, tables: Sequence[Table], *remarks: str) -> None:
    """Write tables as a document takes them, and remarks below."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as sink:
        console = Console(file=sink, width=200)
        for table in tables:
            title, table.title, table.box = table.title, None, box.MARKDOWN
            console.print(f"**{title}**\n", markup=False)
            console.print(table)
        for remark in remarks:
            console.print(remark, markup=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.growth", description=__doc__)
    parser.add_argument(
        "--gib", type=float, nargs="+", default=[1, 2, 4, 8, 16], help="sizes of a saved state, in GiB"
    )
    parser.add_argument("--repeats", type=int, default=3, help="saves of each size (default: 3)")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[4**n for n in range(7)], help="whose results are committed"
    )
    parser.add_argument("--tensors", type=int, default=300, help="of which a rank has a chunk (default: 300)")
    parser.add_argument("--json", type=Path, default=Path("build/bench/growth.json"))
    parser.add_argument("--markdown", type=Path, help="a file for the tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
