"""The jobs that meet at one checkpoint: they run the library's own code, as DCP and its users call it."""

from __future__ import annotations

import copy
import functools
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import StorageWriter

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.manage.delete import delete_checkpoint
from cloudckpt.backends.manage.gc import Garbage, collect_garbage
from cloudckpt.backends.save.save_lease import SILENT_FOR
from cloudckpt.retention import Retention, prune
from cloudckpt.run import Run
from support.lagging import GHOST, neighbour
from support.scenario import Part, Role

AT_ONCE = timedelta(0)
EVEN_NEWER = timedelta(days=-1)
"""An age that everything has, whenever it was made."""
LONG = timedelta(days=1)


def creator(name: str) -> Role:
    return Role(name, Part.CREATES, functools.partial(save, name=name))


def overwriter(name: str) -> Role:
    return Role(name, Part.OVERWRITES, functools.partial(save, name=name, overwrite=True))


def reader(name: str) -> Role:
    return Role(name, Part.READS, load)


def deleter(name: str) -> Role:
    return Role(name, Part.DELETES, delete_checkpoint)


def collector(name: str) -> Role:
    """Take nothing for too young, and no save for dead that has a marker."""
    act = functools.partial(collect, older_than=EVEN_NEWER, silent_for=LONG)
    return Role(name, Part.COLLECTS, act)


def clearer(name: str) -> Role:
    """Take every save for dead."""
    act = functools.partial(collect, older_than=EVEN_NEWER, silent_for=EVEN_NEWER)
    return Role(name, Part.CLEARS, act)


def lagging_collector(name: str) -> Role:
    """Collect as ``gc --older-than 0s`` does."""
    return Role(name, Part.COLLECTS, functools.partial(collect, older_than=AT_ONCE, silent_for=SILENT_FOR))


def pruner(name: str) -> Role:
    """Keep the newest step of the run, which is another one than the checkpoint."""
    return Role(name, Part.PRUNES, functools.partial(_prune, newest=2))


def misled_pruner(name: str) -> Role:
    """Keep the newest step of a run whose listing shows a newer one that was deleted."""
    return Role(name, Part.PRUNES, functools.partial(_prune, newest=GHOST))


def is_misled(role: Role) -> bool:
    return isinstance(role.act, functools.partial) and role.act.keywords.get("newest") == GHOST


def withdrawer(name: str) -> Role:
    return Role(name, Part.SETS_ASIDE, lambda uri: Run(_run_of(uri)).set_aside(1))


def _prune(uri: str, newest: int) -> list[int]:
    with neighbour(newest):
        return prune(Run(_run_of(uri)), Retention(keep_last=1))


def _run_of(uri: str) -> Target:
    return Target.parse(uri.rpartition("/")[0])


def state_of(name: str) -> dict[str, torch.Tensor]:
    """What a writer of this name saves."""
    number = int.from_bytes(name.encode(), "big")
    return {"x": torch.full((4,), number), "y": torch.full((3,), number, dtype=torch.float64)}


def save(uri: str, *, name: str, overwrite: bool = False) -> None:
    """Save with a storage writer of this library."""
    save_by(cloudckpt.StorageWriter(uri, overwrite=overwrite, concurrency=1), name)


def save_by(writer: StorageWriter, name: str) -> None:
    """Call a storage writer as DCP does on the coordinator of one rank."""
    plan, planner, metadata = _planned(name)
    writer.reset(None)
    writer.set_up_storage_writer(True, rank=0, use_collectives=True)
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(plan)])
    results: Any = writer.write_data(plan, planner).value()
    writer.finish(copy.copy(metadata), [results])


@functools.cache
def _planned(name: str) -> tuple[SavePlan, DefaultSavePlanner, Metadata]:
    """Plan once: no writer changes a plan, and what it adds to the metadata goes to a copy."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(state_of(name), None, True)
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    return planner.finish_plan(plans[0]), planner, metadata


def load(uri: str) -> dict[str, torch.Tensor]:
    """Call a storage reader as DCP does on one rank."""
    reader = cloudckpt.StorageReader(uri, concurrency=1)
    state = {name: torch.zeros_like(tensor) for name, tensor in state_of("").items()}
    metadata = reader.read_metadata()
    planner = DefaultLoadPlanner()
    planner.set_up_planner(state, metadata, True)
    reader.set_up_storage_reader(metadata, True, rank=0)
    (plan,) = planner.create_global_plan([planner.create_local_plan()])
    reader.read_data(planner.finish_plan(plan), planner).wait()
    return state


def collect(uri: str, *, older_than: timedelta = AT_ONCE, silent_for: timedelta = AT_ONCE) -> Garbage:
    return collect_garbage(uri, older_than=older_than, silent_for=silent_for)
