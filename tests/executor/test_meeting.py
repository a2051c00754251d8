"""The store in which ranks meet: read from the environment at each start, and chosen anew after a failure."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import DistNetworkError, TCPStore

from cloudckpt.backends.errors import ExecutorError
from cloudckpt.executor import ProcessExecutor
from cloudckpt.executor.coordination.rank_group import RankGroup
from cloudckpt.executor.coordination.rendezvous import MeetingPlace, unreached
from cloudckpt.executor.network.network_options import NetworkOptions
from support.gc_report import Reporting
from support.ranks import RankPool, RankPools

START = 15.0
"""Seconds in which a process starts on a busy machine."""
STATE = {"w": torch.ones(10)}


@pytest.fixture
def pool(rank_pool: RankPools) -> RankPool:
    return rank_pool(2)


def save(executor: ProcessExecutor, folder: Path, step: int) -> None:
    executor.execute_save(STATE, checkpoint_id=f"file://{folder}/{step}").result(60)


def store_on_rank_0(rank: int) -> tuple[TCPStore | None, int]:
    """Open a store on rank 0, and return its port on every rank."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = [store.port if store is not None else None]
    dist.broadcast_object_list(port)
    assert port[0] is not None
    return store, port[0]


def named(port: int) -> dict[str, str]:
    return {"DCP_USE_PREFIX_STORE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_the_environment_is_read_at_each_start_of_a_process(tmp_path: Path) -> None:
    def collects(step: int) -> str:
        folder = tmp_path / str(step)
        executor.execute_save(STATE, storage_writer=Reporting(folder)).result(60)
        return (folder / "collects").read_text()

    with ProcessExecutor(60, 60) as executor:
        assert collects(1) == "True"
        with mock.patch.dict(os.environ, {"DCP_DISABLE_AUTOMATIC_GC": "1"}):
            assert collects(2) == "True"  # the process that is there serves on
            assert executor.pid is not None
            os.kill(executor.pid, signal.SIGKILL)
            with pytest.raises(ExecutorError):
                collects(3)
            assert collects(4) == "False"


def test_an_address_that_was_put_right_is_used_by_the_next_save(pool: RankPool, tmp_path: Path) -> None:
    def on_rank(rank: int) -> bool:
        store, port = store_on_rank_0(rank)
        closed, unused = store_on_rank_0(rank)
        del closed
        dist.barrier()
        with ProcessExecutor(60, START) as executor:
            with mock.patch.dict(os.environ, named(unused)), pytest.raises(ExecutorError) as caught:
                save(executor, tmp_path, 1)
            said = caught.value.unreachable and str(unused) in str(caught.value)
            with mock.patch.dict(os.environ, named(port)):
                save(executor, tmp_path, 2)
                save(executor, tmp_path, 3)
            dist.barrier()
            del store
            return said

    assert pool(on_rank) == [True, True]
    assert [step for step in (1, 2, 3) if (tmp_path / f"{step}/.metadata").exists()] == [2, 3]


def test_a_new_group_meets_in_the_store_that_is_named_then(pool: RankPool, tmp_path: Path) -> None:
    """The group's store moves with MASTER_PORT at the next start of the processes, on all ranks."""

    def on_rank(rank: int) -> bool:
        store, port = store_on_rank_0(rank)
        other, other_port = store_on_rank_0(rank)
        with ProcessExecutor(60, START) as executor:
            with mock.patch.dict(os.environ, named(port)):
                save(executor, tmp_path, 1)
            with mock.patch.dict(os.environ, named(other_port)):
                if rank == 0:
                    assert executor.pid is not None
                    os.kill(executor.pid, signal.SIGKILL)
                with pytest.raises(ExecutorError):
                    save(executor, tmp_path, 2)
                before = other.num_keys() if other is not None else 0
                dist.barrier()
                save(executor, tmp_path, 3)
                after = other.num_keys() if other is not None else 1
            dist.barrier()
            del store, other
            return after > before

    assert pool(on_rank) == [True, True]


@pytest.mark.parametrize(
    ("cut_off", "prefix_store"), [pytest.param(0, "1", marks=pytest.mark.soak), (1, "0")]
)
def test_after_a_rank_could_not_reach_the_store_all_ranks_choose_again(
    pool: RankPool, tmp_path: Path, cut_off: int, prefix_store: str
) -> None:
    def on_rank(rank: int) -> tuple[str, int | None]:
        store, port = store_on_rank_0(rank)
        environment = named(port) | {"DCP_USE_PREFIX_STORE": prefix_store}
        with mock.patch.dict(os.environ, environment), ProcessExecutor(60, START) as executor:
            with mock.patch.object(
                MeetingPlace, "connect", refuse if rank == cut_off else MeetingPlace.connect
            ):
                with pytest.raises(ExecutorError) as caught:
                    save(executor, tmp_path, 1)
                dist.barrier()
            save(executor, tmp_path, 2)
            place = executor.ranks("a look").place
            assert place is not None
            dist.barrier()
            del store
            return place.prefix, caught.value.rank

    def refuse(place: MeetingPlace, name: str, timeout: float) -> NoReturn:
        raise place.absent(DistNetworkError("cut off"))

    one, two = pool(on_rank)
    assert one == two
    assert one[1] == cut_off


def test_ranks_that_only_missed_one_another_meet_in_the_same_place_again(pool: RankPool) -> None:
    def on_rank(rank: int) -> bool:
        ranks = RankGroup(2, None, NetworkOptions())
        ranks.gather(None, no_dist=False, call="a call")
        before = ranks.place
        ranks.failed(ExecutorError("a rank was missing"))
        ranks.gather(None, no_dist=False, call="a call")
        dist.barrier()
        return ranks.place is before

    assert pool(on_rank) == [True, True]


def test_a_rank_that_no_other_rank_missed_goes_on_in_the_same_place(pool: RankPool) -> None:
    """It waits for another choice in vain, and must come back in time."""

    def on_rank(rank: int) -> bool:
        ranks = RankGroup(2, None, NetworkOptions())
        ranks.gather(None, no_dist=False, call="a call")
        before = ranks.place
        if rank == 1:
            ranks.failed(unreached("cut off for a moment", rank=1, hint=""))
        ranks.gather(None, no_dist=False, call="a call")
        dist.barrier()
        return ranks.place is before

    assert pool(on_rank) == [True, True]


@pytest.fixture(autouse=True)
def _no_settings() -> Iterator[None]:
    with mock.patch.dict(os.environ):
        for name in ("DCP_USE_PREFIX_STORE", "DCP_DISABLE_AUTOMATIC_GC"):
            os.environ.pop(name, None)
        yield
