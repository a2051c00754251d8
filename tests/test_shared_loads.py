"""Loads of several ranks that share their reads: what is loaded, what damage does, who may opt out."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import cloudckpt
from cloudckpt.backends.load import shared_reader
from support.ranks import RankPools

_SHAPE = (600, 1000)


def _state() -> dict[str, Any]:
    return {
        "large": torch.arange(600_000, dtype=torch.float32).view(_SHAPE),
        "small": torch.arange(10),
        "empty": torch.empty(0, 3),
        "value": {"step": 7, "name": "run"},
    }


def save(_: int, uri: str) -> None:
    dcp.save(_state(), storage_writer=cloudckpt.StorageWriter(uri))


def blank(rank: int) -> dict[str, Any]:
    """Places of another kind on every rank: as saved, of another type, transposed."""
    state: dict[str, Any] = {
        "large": torch.zeros(_SHAPE),
        "small": torch.zeros(10, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "value": {"step": 0, "name": ""},
    }
    if rank == 1:
        state["large"] = torch.zeros(_SHAPE, dtype=torch.float64)
    if rank == 2:
        state["large"] = torch.zeros(_SHAPE[::-1]).t()
    return state


def load(rank: int, uri: str, share: list[bool | None], **options: Any) -> int:
    """Load and compare; how many reads this rank had from another."""
    passed: list[int] = []
    receive = shared_reader.SharedReads._receive

    def counting(self: Any, link: Any, batch: Any) -> None:
        receive(self, link, batch)
        passed.append(len(batch.extents))

    shared_reader.SharedReads._receive = counting  # type: ignore[method-assign]
    try:
        state, expected = blank(rank), _state()
        reader = cloudckpt.StorageReader(uri, share=share[rank], **options)
        dcp.load(state, storage_reader=reader)
    finally:
        shared_reader.SharedReads._receive = receive  # type: ignore[method-assign]
    for name in ("large", "small", "empty"):
        assert torch.equal(state[name], expected[name].to(state[name].dtype)), name
    assert state["value"] == expected["value"]
    return sum(passed)


@pytest.fixture(scope="module")
def saved(rank_pool: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    rank_pool(2)(save, f"file://{folder}")
    return folder


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_has_all_of_it_whatever_it_loads_into(
    rank_pool: RankPools, saved: Path, world_size: int
) -> None:
    assert sum(rank_pool(world_size)(load, f"file://{saved}", [True] * world_size)) > 0


@pytest.mark.parametrize("share", [[None, None], [False, False], [True, False], [False, True]])
def test_a_folder_is_read_by_each_rank_itself_and_so_is_what_one_does_not_share(
    rank_pool: RankPools, saved: Path, share: list[bool | None]
) -> None:
    assert rank_pool(2)(load, f"file://{saved}", share) == [0, 0]


def test_so_little_memory_that_nothing_fits_twice_is_no_hindrance(rank_pool: RankPools, saved: Path) -> None:
    def loads(rank: int) -> None:
        load(rank, f"file://{saved}", [True] * 3, memory_limit="1MiB")

    rank_pool(3)(loads)


def test_ranks_that_load_different_checkpoints_are_not_mixed_up(rank_pool: RankPools, tmp_path: Path) -> None:
    """Each rank gives the same load another address. In stock checkpoints all objects have the same names."""

    def save_own(rank: int) -> None:
        state = {"t": torch.full((1000, 100), float(rank))}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / str(rank)), no_dist=True)

    def load_own(rank: int) -> float:
        state = {"t": torch.zeros(1000, 100)}
        dcp.load(state, storage_reader=cloudckpt.StorageReader(f"file://{tmp_path}/{rank}", share=True))
        assert state["t"].min() == state["t"].max()
        return float(state["t"].max())

    rank_pool(2)(save_own)
    assert rank_pool(2)(load_own) == [0.0, 1.0]


def test_damage_is_told_on_every_rank(rank_pool: RankPools, tmp_path: Path) -> None:
    rank_pool(2)(save, f"file://{tmp_path}")
    needle = _state()["large"].numpy().tobytes()[1_000_000:1_000_032]
    damaged = [path for path in tmp_path.glob("**/*.distcp") if needle in path.read_bytes()]
    assert len(damaged) == 1
    damaged[0].write_bytes(damaged[0].read_bytes().replace(needle, bytes(32)))

    def loads(rank: int) -> dict[int, str]:
        assert dist.get_world_size() == 2
        with pytest.raises(CheckpointException) as caught:
            load(rank, f"file://{tmp_path}", [True, True])
        return {
            at: f"{type(failure[0]).__name__}: {failure[0]}" for at, failure in caught.value.failures.items()
        }

    for failures in rank_pool(2)(loads):
        assert set(failures) == {0, 1}
        for said in failures.values():
            assert "IntegrityError" in said
            assert damaged[0].name in said


def test_the_reader_keeps_the_switch_when_it_is_pickled_and_refuses_what_is_none() -> None:
    for share in (None, True, False):
        reader = pickle.loads(pickle.dumps(cloudckpt.StorageReader("memory://x", share=share)))
        assert ("share" in repr(reader)) == (share is not None)
        assert repr(reader) == repr(cloudckpt.StorageReader("memory://x", share=share))
    with pytest.raises(cloudckpt.ConfigurationError, match="share"):
        cloudckpt.StorageReader("memory://x", share="no")  # type: ignore[arg-type]
