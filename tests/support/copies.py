"""Checkpoints to copy, copies of them, and what an outsider finds where they went."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import cloudckpt
from cloudckpt import Copied
from cloudckpt.backends.copy.journal import JOURNAL_NAME
from cloudckpt.backends.errors import CheckpointNotFoundError
from cloudckpt.backends.format import metadata as md
from support import states
from support.places import Place

STATE: dict[str, Any] = {
    "large": torch.arange(2_000_000, dtype=torch.float32),  # two parts on S3, and chunks across their border
    "odd": torch.arange(77_777, dtype=torch.int16),
    "nothing": torch.zeros(0),
    "epoch": 3,
}


def saved(place: Place, state: dict[str, Any] | None = None, **options: Any) -> Place:
    """Commit a checkpoint; where it is."""
    dcp.save(STATE if state is None else state, storage_writer=place.writer(**options))
    return place


def copied(source: Place, destination: Place, *, overwrite: bool = False, **options: Any) -> Copied:
    """Copy a checkpoint; ``options`` are of the destination."""
    return cloudckpt.copy_checkpoint(
        source.uri,
        destination.uri,
        overwrite=overwrite,
        source_options=source.options,
        destination_options={**destination.options, **options},
    )


def data_of(place: Place) -> list[str]:
    """Names of the data objects that are committed."""
    return sorted(md.objects_of(md.load(place.read(md.METADATA_NAME), uri=place.uri)))


def assert_same(source: Place, destination: Place, state: dict[str, Any] | None = None) -> None:
    """Every byte is at the destination, nothing else is, and it loads."""
    names = {md.METADATA_NAME, *data_of(source)}
    assert destination.visible() == names
    assert destination.pending() == set()
    for name in names:
        assert destination.read(name) == source.read(name), name
    expected = STATE if state is None else state
    found = states.erase(expected)
    dcp.load(found, storage_reader=destination.reader())
    states.assert_bit_exact(found, expected)


def shows_nothing(place: Place) -> bool:
    """Whether a reader finds no checkpoint."""
    try:
        dcp.load(states.erase(STATE), storage_reader=place.reader())
    except CheckpointException as error:
        return all(type(one) is CheckpointNotFoundError for one, _ in error.failures.values())
    return False


def journalled(place: Place) -> dict[str, Any]:
    """What a copy's journal says is there, by object: nothing where there is no journal."""
    if JOURNAL_NAME not in place.visible():
        return {}
    found: dict[str, Any] = json.loads(place.read(JOURNAL_NAME))["objects"]
    return found


def owner(place: Place) -> str | None:
    """Which copy a journal belongs to."""
    if JOURNAL_NAME not in place.visible():
        return None
    found: str = json.loads(place.read(JOURNAL_NAME))["copy"]
    return found


def arrived(place: Place) -> int:
    """Bytes that a copy's journal says are there."""
    return sum(
        entry["size"] if entry["done"] is not None else sum(one["part"]["size"] for one in entry["parts"])
        for entry in journalled(place).values()
    )


def flip(place: Place, name: str, at: int) -> None:
    """Change one bit of an object."""
    data = bytearray(place.read(name))
    data[at] ^= 1
    place.write(name, bytes(data))
