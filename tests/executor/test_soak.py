"""Many saves with random faults: what is committed loads, and neither process grows."""

from __future__ import annotations

import gc
import os
import random
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from cloudckpt.executor import ProcessExecutor
from support import executors, saboteurs
from support.executors import assert_loads, living, small_state
from support.ranks import RankPool, RankPools
from support.saboteurs import Saboteur

SHORT, LONG = 12, 200
SAVE_TIMEOUT = 10.0
WARM = 10
"""Saves after which a process must not grow any more."""
RANKS = 2

HARMLESS = [
    (saboteurs.SET_UP, saboteurs.RAISE),
    (saboteurs.WRITE_DATA, saboteurs.RAISE),
    (saboteurs.WROTE, saboteurs.RAISE),
    (saboteurs.FINISH, saboteurs.RAISE),
    (saboteurs.PUT, saboteurs.RAISE),
]
DEADLY = [
    (saboteurs.WRITE_DATA, saboteurs.EXIT_17),
    (saboteurs.WROTE, saboteurs.KILL),
    (saboteurs.WROTE, saboteurs.STOP),
    (saboteurs.FINISH, saboteurs.KILL),
    (saboteurs.PUT, saboteurs.KILL),
    (saboteurs.COMMITTED, saboteurs.KILL),
]
ON_COORDINATOR = {saboteurs.FINISH, saboteurs.PUT, saboteurs.COMMITTED}


@dataclass
class Usage:
    """Resident bytes and descriptors of one process, save by save."""

    rss: list[int] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)

    def look(self, pid: int) -> None:
        process = psutil.Process(pid)
        self.rss.append(process.memory_info().rss)
        self.fds.append(process.num_fds())


def slope(values: list[int]) -> float:
    """Growth a save, by least squares."""
    n = len(values)
    middle, mean = (n - 1) / 2, sum(values) / n
    return sum((x - middle) * (y - mean) for x, y in enumerate(values)) / sum(
        (x - middle) ** 2 for x in range(n)
    )


def assert_flat(usage: Usage, state_bytes: int) -> None:
    """A leak of the state, or of a descriptor, would show as a slope; noise of an allocator does not."""
    if len(usage.rss) >= 2 * WARM:
        # An allocator keeps a buffer or two of a state's size for later; a leak brings one with each save.
        assert slope(usage.rss[WARM:]) < 4 * state_bytes / len(usage.rss[WARM:])
        assert slope(usage.fds[WARM:]) < 0.1


def soak(saves: int, seed: int, save: Any) -> dict[str, int]:
    """Run the saves; returns how many ended how. ``save(step, fault)`` returns the outcome's name."""
    random_ = random.Random(seed)
    outcomes: dict[str, int] = defaultdict(int)
    for step in range(saves):
        dice = random_.random()
        faults = DEADLY if dice < 0.08 else HARMLESS if dice < 0.25 else [(None, None)]
        outcomes[save(step, random_.choice(faults), random_.randrange(RANKS))] += 1
    return dict(outcomes)


def one_rank(root: Path, saves: int, seed: int) -> dict[str, int]:
    trainer = Usage()
    processes: dict[int, Usage] = defaultdict(Usage)
    state: dict[str, Any] = {}
    with ProcessExecutor(save_timeout=SAVE_TIMEOUT, start_timeout=60.0) as executor:

        def save(step: int, fault: Any, _rank: int) -> str:
            state.clear()
            state.update(small_state(step) | {"bulk": small_state(step)["shard_0"].repeat(70, 1)})
            folder = root / f"step-{step}"
            folder.mkdir()
            where, what = fault
            writer = Saboteur(f"file://{folder}/saved", where, what, folder=folder)
            error = executor.execute_save(state, storage_writer=writer).exception(timeout=120)
            committed = (folder / "saved" / ".metadata").exists()
            if committed:
                assert_loads(f"file://{folder}/saved", state)
            if where is None:
                assert error is None, error
            assert committed == (error is None or where == saboteurs.COMMITTED)
            shutil.rmtree(folder)
            gc.collect()  # what loading leaves to it, which is the test's and not the executor's
            trainer.look(os.getpid())
            if executor.pid is not None:
                processes[executor.pid].look(executor.pid)
            return "saved" if error is None else type(error).__name__

        outcomes = soak(saves, seed, save)
    size = sum(value.nbytes for value in state.values() if hasattr(value, "nbytes"))
    for usage in (trainer, *processes.values()):
        assert_flat(usage, size)
    return outcomes


def two_ranks(pool: RankPool, root: Path, saves: int, seed: int) -> dict[str, int]:
    def on_rank(rank: int, step: int, fault: Any, which: int) -> str:
        executor = living("soak", save_timeout=SAVE_TIMEOUT, start_timeout=60.0)
        folder = root / f"step-{step}"
        where, what = fault
        writer = Saboteur(f"file://{folder}/saved", where, what, which, folder=folder)
        error = executor.execute_save(small_state(step, rank), storage_writer=writer).exception(timeout=120)
        return "saved" if error is None else type(error).__name__

    def save(step: int, fault: Any, rank: int) -> str:
        which = 0 if fault[0] in ON_COORDINATOR else rank
        folder = root / f"step-{step}"
        folder.mkdir()
        first, second = pool(on_rank, step, fault, which)
        assert first == second, "the same failure reaches every rank"
        if (folder / "saved" / ".metadata").exists():
            for saved_by in range(RANKS):
                assert_loads(f"file://{folder}/saved", small_state(step, saved_by))
        else:
            assert first != "saved"
        if fault[0] is None:
            assert first == "saved"
        shutil.rmtree(folder)
        return first

    try:
        return soak(saves, seed, save)
    finally:
        pool(lambda _rank: executors.end("soak"))


def test_saves_with_random_faults_all_load_and_nothing_grows(tmp_path: Path) -> None:
    outcomes = one_rank(tmp_path, SHORT, seed=11)
    assert outcomes["saved"] >= SHORT / 2
    assert len(outcomes) > 1


def test_ranks_with_random_faults_always_agree(rank_pool: RankPools, tmp_path: Path) -> None:
    outcomes = two_ranks(rank_pool(RANKS), tmp_path, SHORT, seed=5)
    assert outcomes["saved"] >= SHORT / 2
    assert len(outcomes) > 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_200_saves_with_random_faults_all_load_and_nothing_grows(tmp_path: Path) -> None:
    print(one_rank(tmp_path, LONG, seed=random.randrange(1000)))  # noqa: T201 - a soak says what it met


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_200_saves_of_ranks_with_random_faults_always_agree(rank_pool: RankPools, tmp_path: Path) -> None:
    print(two_ranks(rank_pool(RANKS), tmp_path, LONG, seed=random.randrange(1000)))  # noqa: T201


def test_the_slope_that_is_asserted_would_show_a_leak() -> None:
    state = 4_000_000
    with pytest.raises(AssertionError):
        assert_flat(Usage([1_000_000_000 + state * n for n in range(30)], [10] * 30), state)
    with pytest.raises(AssertionError):
        assert_flat(Usage([1_000_000_000] * 30, list(range(30))), state)
