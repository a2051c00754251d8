"""An old step whose metadata is hostile: it keeps nobody from saving, deleting and loading other steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import cloudckpt
from cloudckpt.backends.errors import CheckpointError, ConfigurationError, IntegrityError
from cloudckpt.backends.format import metadata as md
from support import structures
from support.fuzz import sealed
from support.places import Place

_MIB = 1 << 20
DEEP_KEY = b"\x80\x04}N" + b"\x85" * (5 * _MIB) + b"Ns."
HOSTILE: dict[str, Callable[[], bytes]] = {
    "a key nested so deep that its hash would overflow the stack": lambda: sealed(DEEP_KEY),
    "more than metadata_limit": lambda: bytes(9 * _MIB),
    "no pickle": lambda: b"nothing of the kind",
}


@pytest.fixture
def run(place: Place) -> Place:
    return place.child("run")


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_old_step_stops_nothing(run: Place, what: str) -> None:
    options: dict[str, Any] = {**run.options, "metadata_limit": "8MiB"}
    with cloudckpt.Checkpointer(run.uri, keep_last=2, **options) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"w": torch.full((4,), float(step))})
        hostile = run.child("step-0000000002")
        hostile.write(md.METADATA_NAME, HOSTILE[what]())
        for step in (4, 5):
            checkpointer.save(step, {"w": torch.full((4,), float(step))})
        assert checkpointer.latest_step() == 5
        assert {4, 5} <= set(checkpointer.all_steps())
        state = {"w": torch.zeros(4)}
        assert checkpointer.load(state) == 5
        assert state["w"][0] == 5


@pytest.mark.parametrize("what", HOSTILE)
def test_a_load_falls_back_from_a_hostile_newest_step(run: Place, what: str) -> None:
    options: dict[str, Any] = {**run.options, "metadata_limit": "8MiB"}
    with cloudckpt.Checkpointer(run.uri, **options) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"w": torch.full((4,), float(step))})
    newest = run.child("step-0000000002")
    newest.write(md.METADATA_NAME, HOSTILE[what]())
    assert not cloudckpt.verify(newest.uri, **options).ok
    state = {"w": torch.zeros(4)}
    with cloudckpt.Checkpointer(run.uri, **options) as checkpointer:
        with pytest.raises(CheckpointError):
            checkpointer.load(state, step=2)
        assert checkpointer.load(state, fallback=True) == 1
        checkpointer.save(3, state)
        assert checkpointer.latest_step() == 3
    assert state["w"][0] == 1


def test_a_save_whose_metadata_its_readers_would_refuse_is_refused(run: Place) -> None:
    state = {f"layer.{number}.{'x' * 200}": torch.zeros(1) for number in range(4_000)}
    options: dict[str, Any] = {**run.options, "metadata_limit": "1MiB"}
    writer = cloudckpt.StorageWriter(run.uri, **options)
    with pytest.raises(CheckpointException) as raised:
        dcp.save(state, storage_writer=writer, no_dist=True)
    failure, _ = raised.value.failures[0]
    assert isinstance(failure, ConfigurationError)
    assert "metadata_limit" in str(failure)
    assert run.visible() == set()


SHAPES: dict[str, Callable[[random.Random, int], bytes]] = {
    **{name: shape for name, shape in structures.SHAPES.items() if name != "common"},
    **{f"common-{what}": partial(structures.common, what=what) for what in (0, 2, 3, 4, 5, 6, 8)},
}
"""The other two of `common` are harmless, and load."""


@pytest.mark.parametrize("shape", SHAPES)
def test_metadata_of_four_mebibytes_is_refused_by_name(folder: Place, shape: str) -> None:
    folder.write(md.METADATA_NAME, sealed(SHAPES[shape](random.Random(28), 4 * _MIB)))
    with pytest.raises(IntegrityError, match="metadata"):
        md.load(folder.read(md.METADATA_NAME), uri=folder.uri)
    assert not cloudckpt.verify(folder.uri, **folder.options).ok
