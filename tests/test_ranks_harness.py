"""The rank pool itself: values, exceptions, hangs and deaths come back to the test that called."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from support import states
from support.ranks import RankFailure, RankPool, RankPools, RanksHung


class OnlyHere(Exception):
    """An exception class of a test module, which no rank can import."""


class Unpicklable(Exception):
    def __init__(self, lock: object, text: str) -> None:
        super().__init__(text)
        self.lock = lock


@pytest.fixture
def disposable_pool() -> Iterator[RankPool]:
    with RankPool(2, deadline=60.0) as pool:
        yield pool


def all_ranks_together(rank: int, offset: int) -> tuple[int, int]:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return dist.get_world_size(), int(total)


@pytest.mark.parametrize("world_size", [2, 3])
def test_values_come_back_in_rank_order_and_collectives_work(rank_pool: RankPools, world_size: int) -> None:
    expected = sum(rank + 5 for rank in range(world_size))
    assert rank_pool(world_size)(all_ranks_together, 5) == [(world_size, expected)] * world_size
    assert rank_pool(world_size)(lambda rank: rank) == list(range(world_size))


def test_one_rank_runs_in_this_process_without_a_group(rank_pool: RankPools) -> None:
    assert rank_pool(1)(lambda rank: (rank, os.getpid(), dist.is_initialized())) == [(0, os.getpid(), False)]


def test_processes_are_reused(rank_pool: RankPools) -> None:
    assert rank_pool(2)(lambda _: os.getpid()) == rank_pool(2)(lambda _: os.getpid())


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_exception_reaches_the_caller_with_its_type_and_traceback(
    rank_pool: RankPools, world_size: int
) -> None:
    def fail_on_last(rank: int) -> str:
        if rank == world_size - 1:
            raise OnlyHere("no")
        return "fine"

    outcomes = rank_pool(world_size).outcomes(fail_on_last)
    assert [outcome.value for outcome in outcomes] == ["fine"] * (world_size - 1) + [None]
    with pytest.raises(OnlyHere) as caught:
        rank_pool(world_size)(fail_on_last)
    assert "fail_on_last" in "".join(caught.value.__notes__)


def test_an_exception_that_cannot_be_pickled_arrives_as_its_traceback(rank_pool: RankPools) -> None:
    def fail(_rank: int) -> None:
        raise Unpicklable(threading.Lock(), "with a lock")

    with pytest.raises(RankFailure, match="with a lock"):
        rank_pool(2)(fail)


def test_a_hung_rank_fails_the_call_with_its_stack_and_the_pool_recovers(disposable_pool: RankPool) -> None:
    def hang_on_the_second_rank(rank: int) -> None:
        if rank == 1:
            threading.Event().wait()

    disposable_pool(lambda _: None)
    with pytest.raises(RanksHung, match="hang_on_the_second_rank"):
        disposable_pool(hang_on_the_second_rank, deadline=1.0)
    assert disposable_pool(all_ranks_together, 0) == [(2, 1)] * 2


def test_a_dead_rank_fails_the_call_at_once_with_its_exit_code(disposable_pool: RankPool) -> None:
    def die(rank: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    with pytest.raises(RanksHung, match="exit code -9"):
        disposable_pool(die, deadline=600.0)


def differing_leaves(_rank: int) -> tuple[int, int]:
    mesh = states.world_mesh()
    full = states.build(mesh, big=False)
    same = states.compare(states.build(mesh, big=False), full)
    return len(same), len(states.compare(states.blank(mesh, big=False), full))


@pytest.mark.parametrize("world_size", [1, 2])
def test_states_are_the_same_when_built_again_and_a_blank_one_differs_nearly_everywhere(
    rank_pool: RankPools, world_size: int
) -> None:
    for same, different in rank_pool(world_size)(differing_leaves):
        assert same == 0
        assert different > 80
