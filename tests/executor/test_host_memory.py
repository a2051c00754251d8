"""Memory of snapshots is compared with what a host has left, for all of its ranks, before step 0."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import PerRank
from cloudckpt.backends.errors import ExecutorError
from cloudckpt.executor.snapshot import host_memory, memory_limits
from cloudckpt.executor.snapshot.host_memory import Need, check
from cloudckpt.executor.snapshot.memory_limits import Room
from support.ranks import RankPools

MIB = 1 << 20
GROUP = "the control group /sys/fs/cgroup/job (memory.max)"


def need(mib: int, left: int, key: str = "host", swap: int = 0) -> Need:
    return Need(mib * MIB, 0, (Room(left * MIB, swap * MIB, 1000 * MIB, GROUP, key),))


def test_snapshots_that_fit_one_by_one_and_not_together_are_refused_on_every_rank_of_the_host() -> None:
    every = [need(60, 100), need(60, 100), need(60, 100, "another host"), None]
    for rank in (0, 1):
        own = every[rank]
        assert own is not None
        with pytest.raises(
            ExecutorError,
            match=r"the snapshots of 2 ranks on this host need 120 MiB of memory, and 100 MiB are left of "
            r"1,000 MiB, the limit of the control group /sys/fs/cgroup/job",
        ) as refused:
            check(own, every)
        assert "--memory" in str(refused.value)
    assert every[2] is not None
    check(every[2], every)


def test_snapshots_that_need_swap_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    own = need(120, 100, swap=50)
    with caplog.at_level(logging.WARNING, "cloudckpt"):
        check(own, [own])
        assert "a save may run out of memory" in caplog.text


def test_the_least_measure_of_a_limit_counts() -> None:
    every = [need(60, 200), need(60, 110)]
    assert every[0] is not None
    with pytest.raises(ExecutorError, match="110 MiB are left"):
        check(every[0], every)


def test_shared_memory_counts_where_snapshots_lie_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(room.is_shared_memory for room in Need.of(1).rooms)
    monkeypatch.setattr(host_memory, "memory_file", lambda: None)
    (room,) = [room for room in Need.of(1).rooms if room.is_shared_memory]
    own = Need(room.nbytes + 1, 0, (room,))
    with pytest.raises(ExecutorError, match=r"the limit of /dev/shm.*--shm-size"):
        check(own, [own])


def test_a_machine_and_its_control_groups_are_told_apart() -> None:
    keys = [room.key for room in memory_limits.rooms()]
    assert keys and all(keys) and len(set(keys)) == len(keys)


def larger_than_the_host(folder: Path) -> torch.Tensor:
    """Return a tensor over a sparse file that nothing reads, twice as large as the memory that is left."""
    room = memory_limits.least_room()
    assert room is not None
    size = 2 * (room.nbytes + room.swap)
    return torch.from_file(str(folder / "sparse"), shared=True, size=size, dtype=torch.uint8)


def test_warmup_refuses_a_state_that_does_not_fit_before_any_memory_is_taken(tmp_path: Path) -> None:
    with cloudckpt.Checkpointer(tmp_path / "run", progress=False) as checkpointer:
        with pytest.raises(ExecutorError, match="the snapshots of this rank on this host need"):
            checkpointer.warmup({"huge": larger_than_the_host(tmp_path)})
        assert checkpointer.save(1, {"small": torch.ones(3)}).step == 1


def warm_up(rank: int, folder: str) -> str:
    uri = f"file://{folder}/run"
    with cloudckpt.Checkpointer(
        uri, progress=False, start_timeout=60.0, preemption_grace=None
    ) as checkpointer:
        state: dict[str, Any] = {
            "own": PerRank(larger_than_the_host(Path(folder)) if rank == 1 else torch.ones(3))
        }
        try:
            checkpointer.warmup(state)
        except ExecutorError as error:
            return str(error)
        return "fits"


def test_warmup_refuses_on_every_rank(rank_pool: RankPools, tmp_path: Path) -> None:
    for said in rank_pool(2)(warm_up, str(tmp_path)):
        assert "the snapshots of 2 ranks on this host need" in said
