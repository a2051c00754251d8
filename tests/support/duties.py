"""What each role has to do, all of it: who may do no more than this needs may do no less."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt import Checkpointer, CheckpointNotFoundError
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.manage.gc import collect_garbage
from cloudckpt.backends.stores import open_store
from support import roles
from support.commands import at, run, save
from support.places import Place
from support.proxy import Answer, LoseAnswer, Proxy

STEPS = (1, 2, 3)
_MINUTE = 60.0
_REFUSED = [Answer(400, "InvalidRequest")] * 20


def tell(role: str, granted: Iterable[str], made: Mapping[tuple[str, str], int]) -> None:
    """Print what a role is granted, and the requests that needed it: how many of each operation."""
    print(f"\n{role}")  # noqa: T201 - a table to read
    for one in sorted(granted):
        of_it = (f"{name} x{count}" for (name, needed), count in made.items() if count and needed == one)
        print(f"  {one:32} {', '.join(of_it) or 'nothing'}")  # noqa: T201


def state(step: int) -> dict[str, Any]:
    return {"t": torch.full((1000,), float(step)), "step": step}


def prepare(place: Place) -> None:
    """Leave a run of some steps, and beside them what a save that died leaves."""
    for step in STEPS:
        save(place, state(step), step)
    dead = f"step-{STEPS[-1]:010}/"
    place.write(f"{dead}__0_0.{'0' * 32}.distcp", b"never committed")
    place.write(f"{dead}.cloudckpt-save.{'0' * 32}", b"silent")
    with open_store(Target.parse(place.uri, **place.options)) as store:
        store.begin_upload(f"{dead}__1_0.{'0' * 32}.distcp")


def train(place: Place, proxy: Proxy) -> None:
    """Save, resume and let go of steps, and clean up after saves that fail."""
    with Checkpointer(
        place.uri, keep_last=1, **place.options, save_timeout=_MINUTE, start_timeout=_MINUTE
    ) as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.warmup()
        checkpointer.save(1, state(1))
        checkpointer.async_save(2, state(2)).result()
        assert checkpointer.all_steps() == [2]
        loaded = state(0)
        assert checkpointer.load(loaded) == 2
        assert loaded["t"][0] == 2
        with pytest.raises(CheckpointNotFoundError):
            checkpointer.load(loaded, step=99)
        checkpointer.pin(2)
        checkpointer.unpin(2)
    assert run("cp", at(place, 2).uri, place.child("copied").uri, place=place).status == 0
    other = place.child("other")
    dcp.save(state(1), storage_writer=other.writer())
    dcp.save(state(2), storage_writer=other.writer(overwrite=True))
    with pytest.raises(CheckpointException, match="CheckpointExistsError"):
        dcp.save(state(3), storage_writer=other.writer())
    failed = place.child("failed")
    proxy.spoil("UploadPart", _REFUSED)
    proxy.spoil("CompleteMultipartUpload", _REFUSED)
    with pytest.raises(CheckpointException, match="InvalidRequest"):
        dcp.save(state(1), storage_writer=failed.writer())
    proxy.spoil("UploadPart", [])
    proxy.spoil("CompleteMultipartUpload", [])
    proxy.spoil("CreateMultipartUpload", [LoseAnswer()])
    dcp.save(state(1), storage_writer=failed.writer())


def read(place: Place) -> None:
    """Load, look and check, by the library and by the commands."""
    loaded = state(0)
    with Checkpointer(place.uri, **place.options) as checkpointer:
        assert checkpointer.load(loaded) == STEPS[-1]
    assert loaded["t"][0] == STEPS[-1]
    for command in ("ls", "show", "verify"):
        assert run(command, place.uri, place=place).status == 0, command
    assert run("diff", at(place, 1).uri, at(place, 2).uri, place=place).status == 1
    with pytest.raises(CheckpointException, match="CheckpointNotFoundError"):
        dcp.load(loaded, storage_reader=place.child("nowhere").reader())
    for command in ("show", "verify"):
        assert run(command, place.child("nowhere").uri, place=place).status != 0, command


def tidy(place: Place, *, lists_uploads: bool = True) -> None:
    """Remove what the dead left, older steps, and a checkpoint."""
    found = collect_garbage(
        place.uri, older_than=roles.EVEN_NEWER, silent_for=roles.EVEN_NEWER, **place.options
    )
    assert found.objects and found.traces and bool(found.uploads) is lists_uploads
    assert run("ls", place.uri, place=place).status == 0
    assert run("gc", place.uri, "--yes", place=place).status == 0
    assert run("prune", place.uri, "--keep-last", "2", "--yes", place=place).status == 0
    assert run("rm", place.uri, "--step", str(STEPS[-1]), "--yes", place=place).status == 0
