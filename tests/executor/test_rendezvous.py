"""Where checkpoint processes meet: the environment's rules, ways to start a job, ranks that are missing."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.executor import ProcessExecutor, ProcessGroupInfo
from cloudckpt.executor.coordination.meeting_store import Meeting
from cloudckpt.executor.network.network_options import NetworkOptions
from support.executors import within
from support.ranks import RankPool, RankPools
from support.trainers import ROOT, TrainerProcess, TrainerRaised

NAMES = (
    "DCP_USE_PREFIX_STORE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "DCP_DISABLE_AUTOMATIC_GC",
    "DCP_DISABLE_MANUAL_GC",
)


@pytest.fixture
def pool(rank_pool: RankPools) -> RankPool:
    """Two ranks that met in a file, so that training has no TCP store."""
    return rank_pool(2)


def info(_rank: int, environment: dict[str, str], **arguments: Any) -> dict[str, Any]:
    """What `ProcessGroupInfo` makes of an environment, or the failures by rank."""
    with mock.patch.dict(os.environ, environment):
        for name in set(NAMES) - environment.keys():
            os.environ.pop(name, None)
        try:
            found = ProcessGroupInfo(**arguments)
        except CheckpointException as error:
            return {"failures": {rank: repr(failure) for rank, (failure, _) in error.failures.items()}}
        with (
            socket.create_connection((found.tcp_store_master_addr, found.tcp_store_master_port), 5)
            if (not found.use_prefix_store)
            else ExitStack()
        ):
            dist.barrier()  # rank 0's store lives until all have tried it
        again = pickle.loads(pickle.dumps(found))
        return {name: value for name, value in vars(again).items() if name[0] != "_"}


def test_without_the_prefix_store_a_port_that_is_bound_already_is_agreed_on(pool: RankPool) -> None:
    for value in (None, "0", "true", "1 ", ""):
        first, second = pool(info, {} if value is None else {"DCP_USE_PREFIX_STORE": value})
        assert first["use_prefix_store"] is second["use_prefix_store"] is False
        assert first["tcp_store_master_port"] == second["tcp_store_master_port"] > 0
        assert first["tcp_store_master_addr"] == second["tcp_store_master_addr"]
        assert [found["global_rank"] for found in (first, second)] == [0, 1]
        assert [found["world_size"] for found in (first, second)] == [2, 2]


@pytest.mark.parametrize("by", ["environment", "argument"])
def test_the_prefix_store_is_where_the_environment_says(pool: RankPool, by: str) -> None:
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": "12345"}
    if by == "environment":
        found = pool(info, environment | {"DCP_USE_PREFIX_STORE": "1"})
    else:

        def with_argument(rank: int) -> dict[str, Any]:
            return info(rank, environment, use_prefix_store=True)

        found = pool(with_argument)
    for one in found:
        assert one["use_prefix_store"] is True
        assert (one["tcp_store_master_addr"], one["tcp_store_master_port"]) == ("localhost", 12345)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "MASTER_ADDR and MASTER_PORT"),
        ({"MASTER_ADDR": "localhost"}, "MASTER_PORT"),
        ({"MASTER_PORT": "12345"}, "MASTER_ADDR"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "a"}, "MASTER_PORT is 'a'"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({"MASTER_ADDR": "", "MASTER_PORT": "12345"}, "MASTER_ADDR is empty"),
    ],
)
def test_a_missing_or_malformed_address_is_told_on_every_rank(
    pool: RankPool, environment: dict[str, str], said: str
) -> None:
    for found in pool(info, environment | {"DCP_USE_PREFIX_STORE": "1"}):
        assert said in found["failures"][0]


def test_the_executor_tells_of_a_malformed_address_on_every_rank(pool: RankPool, tmp_path: Path) -> None:
    def attempt(_rank: int) -> list[str]:
        environment = {"DCP_USE_PREFIX_STORE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "port"}
        with mock.patch.dict(os.environ, environment), ProcessExecutor(start_timeout=30) as executor:
            with pytest.raises(CheckpointException) as caught:
                executor.execute_save({"a": 1}, checkpoint_id=f"{tmp_path}/a")
            return [str(failure) for failure, _ in caught.value.failures.values()]

    for said in pool(attempt):
        assert "MASTER_PORT is 'port'" in said[0]


def test_garbage_collection_is_read_from_the_environment(pool: RankPool) -> None:
    found = pool(info, {"DCP_DISABLE_AUTOMATIC_GC": "1", "DCP_DISABLE_MANUAL_GC": "yes"})
    assert [(one["disable_automatic_gc"], one["disable_manual_gc"]) for one in found] == [(True, False)] * 2


def test_a_single_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    found = ProcessGroupInfo()
    assert (found.global_rank, found.world_size, found.local_rank) == (0, 1, 0)
    with pytest.raises(CheckpointException):
        ProcessGroupInfo(use_prefix_store=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(stack: ExitStack, folder: Path, method: str, **options: Any) -> list[TrainerProcess]:
    environment = options.pop("environment", {})
    made = [
        stack.enter_context(
            TrainerProcess(
                folder, rank=rank, init_method=method, world_size=2, executor=options, environment=environment
            )
        )
        for rank in range(2)
    ]
    return [trainer.started() for trainer in made]


@pytest.mark.parametrize("prefix_store", [None, "0", "1"])
def test_a_job_that_met_by_tcp_saves(tmp_path: Path, prefix_store: str | None) -> None:
    environment = {} if prefix_store is None else {"DCP_USE_PREFIX_STORE": prefix_store}
    with ExitStack() as stack:
        trainers = start(
            stack,
            tmp_path,
            f"tcp://127.0.0.1:{free_port()}",
            environment=environment,
            start_timeout=60.0,
        )
        for step in range(2):
            for trainer in trainers:
                trainer.tell("save", step)
            assert [trainer.answer() for trainer in trainers] == [{"error": None}] * 2
        for trainer in trainers:
            trainer.tell("close")
        for trainer in trainers:
            trainer.answer()


JOB = """
import sys, torch, torch.distributed as dist
from cloudckpt.executor import ProcessExecutor
from support.executors import small_state
from cloudckpt.executor.coordination.rendezvous import tcp_store_of_training

dist.init_process_group("gloo")
rank = dist.get_rank()
with ProcessExecutor(save_timeout=60, start_timeout=60) as executor:
    for step in range(2):
        executor.execute_save(small_state(step, rank), checkpoint_id=f"{sys.argv[1]}/step-{step}").result()
        assert executor._ranks._meeting.hosted is None, "the agent's store was there"
dist.destroy_process_group()
"""


def test_a_job_that_torchrun_started_saves_in_the_agents_store(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(JOB)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tests"),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        [*torchrun, "--nproc-per-node=2", script, tmp_path],
        env=environment, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "step-1" / ".metadata").exists()


@pytest.mark.soak
@pytest.mark.parametrize("late", [0, 1])
def test_a_missing_rank_fails_the_ranks_that_wait_and_is_welcome_later(tmp_path: Path, late: int) -> None:
    with ExitStack() as stack:
        trainers = start(stack, tmp_path, f"file://{tmp_path}/meeting", start_timeout=20.0, save_timeout=60.0)
        waiting = trainers[1 - late]
        with within(80):
            try:
                outcome = waiting.ask("save", 1)
            except TrainerRaised as raised:  # where rank 0 is missing, there is no place to meet yet
                outcome = {"error": str(raised).partition(":")[0], "said": str(raised)}
        assert outcome["error"] == "ExecutorError"
        assert f"rank {late}" in outcome["said"]
        # The late rank comes to the save that the other has given up, and both go on together after it.
        for trainer in trainers:
            trainer.tell("save", 2)
        outcomes = [trainer.answer() for trainer in trainers]
        assert outcomes == [{"error": None}] * 2


def test_a_rank_that_is_a_save_behind_is_told_and_catches_up(tmp_path: Path) -> None:
    with ExitStack() as stack:
        first, second = start(
            stack, tmp_path, f"file://{tmp_path}/meeting", start_timeout=20.0, save_timeout=60.0
        )
        assert first.ask("save", 1)["error"] == "ExecutorError"
        first.tell("save", 2)
        late = second.ask("save", 1)
        assert late["error"] == "ExecutorError"
        assert second.ask("save", 2) == first.answer() == {"error": None}


def test_a_store_that_can_not_be_reached_fails_within_the_time_to_start(tmp_path: Path) -> None:
    environment = {"DCP_USE_PREFIX_STORE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ExitStack() as stack:
        trainers = start(
            stack,
            tmp_path,
            f"file://{tmp_path}/meeting",
            environment=environment,
            start_timeout=3.0,
        )
        for trainer in trainers:
            trainer.tell("save", 1)
        with within(40):
            outcomes = [trainer.answer() for trainer in trainers]
        for outcome in outcomes:
            assert outcome["error"] == "ExecutorError"
            assert environment["MASTER_PORT"] in outcome["said"]


def prefix_of(rank: int, restart: str, ranks: list[int]) -> str | None:
    if rank not in ranks:
        return None
    with mock.patch.dict(os.environ, {"TORCHELASTIC_RESTART_COUNT": restart}):
        meeting = Meeting(None, None, NetworkOptions())
        prefix: str = meeting.place(timeout=20).prefix
        dist.barrier() if len(ranks) > 1 else None  # rank 0's store lives as long as its meeting
        return prefix


def test_ranks_that_a_launcher_restarts_meet_although_its_store_stays(pool: RankPool) -> None:
    pool(prefix_of, "7", [0])  # one rank was a call ahead of the other when the job failed
    first, second = pool(prefix_of, "8", [0, 1])
    assert first == second
