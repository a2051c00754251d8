"""A save that fails, however, fails alone and alike on every rank: PROMISES 3 and 4."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

import cloudckpt
from cloudckpt.backends.errors import ExecutorDiedError, SaveTimeoutError
from cloudckpt.backends.load.reader import StorageReader
from support import executors, saboteurs
from support.executors import assert_loads, living, small_state
from support.ranks import RankPool, RankPools
from support.saboteurs import Sabotage, Saboteur

RANKS = 2
SAVE_TIMEOUT = 8.0
DEATH = 30.0
"""Seconds within which every rank knows of a death: seconds are promised, and the machine may be busy."""


@pytest.fixture(scope="module")
def pool(rank_pool: RankPools) -> Any:
    pool = rank_pool(RANKS)
    yield pool
    pool(lambda _rank: executors.end("faulty"))


def save(rank: int, step: int, uri: str, folder: Path, where: str | None = None, *how: Any) -> Any:
    """Save on one rank with a writer that may do harm; return generation, result or error, and seconds."""
    executor = living("faulty", save_timeout=SAVE_TIMEOUT, start_timeout=60.0)
    writer = Saboteur(uri, where, *how, folder=folder)
    handle = executor.execute_save(small_state(step, rank), storage_writer=writer)
    error = handle.exception(timeout=100)
    assert handle.done()
    return executor.generation, error


def save_everywhere(pool: RankPool, step: int, root: Path, where: str | None = None, *how: Any) -> list[Any]:
    uri = f"file://{root}/step-{step}"
    return pool(save, step, uri, root, where, *how)


def committed(root: Path, step: int) -> bool:
    return (root / f"step-{step}" / ".metadata").exists()


def assert_two_saves_work(pool: RankPool, root: Path) -> None:
    for step in (2, 3):
        outcomes = save_everywhere(pool, step, root)
        assert [error for _, error in outcomes] == [None] * RANKS
        assert len({generation for generation, _ in outcomes}) == 1
        for rank in range(RANKS):
            assert_loads(f"file://{root}/step-{step}", small_state(step, rank))


@pytest.mark.parametrize(
    ("where", "rank"),
    [
        (saboteurs.SET_UP, 0),
        (saboteurs.SET_UP, 1),
        (saboteurs.WRITE_DATA, 0),
        (saboteurs.WRITE_DATA, 1),
        (saboteurs.FINISH, 0),
        (saboteurs.PUT, 0),
    ],
)
def test_what_raises_on_one_rank_is_raised_on_all_and_the_process_goes_on(
    pool: RankPool, tmp_path: Path, where: str, rank: int
) -> None:
    before = save_everywhere(pool, 0, tmp_path)
    failed = save_everywhere(pool, 1, tmp_path, where, saboteurs.RAISE, rank)
    for at, (_, error) in enumerate(failed):
        assert isinstance(error, Sabotage)
        assert str(error) == f"sabotaged on rank {rank} at {where}"
        assert any(note.startswith(f"raised on rank {rank}") for note in error.__notes__)
        # The frames of the writer, not those of DCP, and on the rank that raised it alone.
        framed = [note for note in error.__notes__ if "saboteurs.py" in note]
        assert bool(framed) is (at == rank), error.__notes__
        assert not any("cloudckpt/" in note or "checkpoint/state_dict_saver" in note for note in framed)
    assert not committed(tmp_path, 1)
    after = save_everywhere(pool, 2, tmp_path)
    assert [error for _, error in after] == [None, None]
    assert after[0][0] == after[1][0] == before[0][0]
    assert_two_saves_work(pool, new_root(tmp_path))


def new_root(tmp_path: Path) -> Path:
    root = tmp_path / uuid.uuid4().hex
    root.mkdir()
    return root


@pytest.mark.parametrize(
    ("where", "what", "rank"),
    [
        (saboteurs.WRITE_DATA, saboteurs.EXIT_17, 1),
        (saboteurs.SET_UP, saboteurs.KILL, 0),
        (saboteurs.WROTE, saboteurs.KILL, 1),
        (saboteurs.FINISH, saboteurs.KILL, 0),
        (saboteurs.PUT, saboteurs.KILL, 0),
        (saboteurs.COMMITTED, saboteurs.KILL, 0),
        (saboteurs.COMMITTED_KILL_1, saboteurs.KILL, 1),
    ],
)
def test_a_process_that_dies_costs_one_save(
    pool: RankPool, tmp_path: Path, where: str, what: str, rank: int
) -> None:
    before = save_everywhere(pool, 0, tmp_path)
    with executors.within(DEATH):
        failed = save_everywhere(pool, 1, tmp_path, where, what, rank)
    for _, error in failed:
        assert isinstance(error, ExecutorDiedError)
        assert error.rank == rank
        assert ("exit code 17" if what == saboteurs.EXIT_17 else "SIGKILL") in str(error)
        assert f"file://{tmp_path}/step-1" in str(error)
        assert "bytes done" in str(error)
    happened = where in (saboteurs.COMMITTED, saboteurs.COMMITTED_KILL_1)
    assert committed(tmp_path, 1) is happened
    if happened:
        for saved_by in range(RANKS):
            assert_loads(f"file://{tmp_path}/step-1", small_state(1, saved_by))
    after = save_everywhere(pool, 2, tmp_path)
    assert [error for _, error in after] == [None, None]
    assert after[0][0] == after[1][0] != before[0][0]
    assert_two_saves_work(pool, new_root(tmp_path))
    for step in (0, 2):
        assert_loads(f"file://{tmp_path}/step-{step}", small_state(step))


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_frozen_process_fails_its_save_at_the_deadline(pool: RankPool, tmp_path: Path, rank: int) -> None:
    save_everywhere(pool, 0, tmp_path)
    with executors.within(SAVE_TIMEOUT + DEATH):
        failed = save_everywhere(pool, 1, tmp_path, saboteurs.WROTE, saboteurs.STOP, rank)
    for _, error in failed:
        assert isinstance(error, SaveTimeoutError)
        assert error.rank == rank
        assert "no sign of life" in str(error)
        assert ".distcp" in str(error.object_name)
        assert "bytes done" in str(error)
    assert not committed(tmp_path, 1)
    assert_two_saves_work(pool, new_root(tmp_path))


def test_a_store_that_hangs_on_one_rank_fails_the_save_on_all_at_the_deadline(
    pool: RankPool, tmp_path: Path
) -> None:
    save_everywhere(pool, 0, tmp_path)
    failed = save_everywhere(pool, 1, tmp_path, saboteurs.WRITE_DATA, saboteurs.WAIT, 1)
    for _, error in failed:
        assert isinstance(error, SaveTimeoutError)
        assert "is alive" in str(error)
    assert not committed(tmp_path, 1)
    assert_two_saves_work(pool, new_root(tmp_path))


def test_a_state_that_cannot_be_taken_on_one_rank_fails_the_save_on_all(
    pool: RankPool, tmp_path: Path
) -> None:
    uri = f"file://{tmp_path}/step-1"

    def attempt(rank: int) -> BaseException | None:
        executor = living("faulty", save_timeout=SAVE_TIMEOUT, start_timeout=60.0)
        state: dict[str, Any] = small_state(1, rank)
        if rank == 1:
            state["nested"]["values"] = {"deep": [lambda: None]}
        handle = executor.execute_save(state, storage_writer=cloudckpt.StorageWriter(uri))
        return handle.exception(timeout=100)

    for error in pool(attempt):
        assert isinstance(error, cloudckpt.ConfigurationError)
        assert "nested.values.deep" in str(error)
    with pytest.raises(cloudckpt.CheckpointNotFoundError):
        StorageReader(uri).read_metadata()
    assert_two_saves_work(pool, new_root(tmp_path))
