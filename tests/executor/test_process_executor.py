"""The executor as its users meet it: order, snapshots, progress, other writers, settings and ends."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import select
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata

import cloudckpt
from cloudckpt.backends.errors import ConfigurationError, ExecutorDiedError, ExecutorError
from cloudckpt.executor import ProcessExecutor, Progress, SaveHandle
from support import executors, saboteurs
from support.executors import assert_loads, living, small_state, until
from support.faults import FaultyPlanner
from support.ranks import RankPool, RankPools
from support.saboteurs import Saboteur

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def executor() -> Iterator[ProcessExecutor]:
    with ProcessExecutor(save_timeout=60, start_timeout=60) as executor:
        executor.warmup(small_state(0))
        yield executor


def waiting(folder: Path, name: str, where: str = saboteurs.WRITE_DATA) -> Saboteur:
    """A writer that stands still until a file ``go`` appears beside its checkpoint."""
    own = folder / name
    own.mkdir(exist_ok=True)
    return Saboteur(f"file://{folder}/{name}", where, saboteurs.WAIT, folder=own)


def test_saves_are_served_in_order_by_one_process_and_each_gets_its_own_answer(
    executor: ProcessExecutor, tmp_path: Path
) -> None:
    pid = executor.pid
    ended: list[int] = []
    handles: list[SaveHandle[Metadata]] = []

    def note(step: int, _: Any) -> None:
        ended.append(step)

    with ProcessExecutor(save_timeout=60, snapshots=2) as two:
        first = two.execute_save(small_state(0), storage_writer=waiting(tmp_path, "0"))
        first.add_done_callback(functools.partial(note, 0))
        second = two.execute_save(small_state(1), checkpoint_id=f"{tmp_path}/1")
        second.add_done_callback(functools.partial(note, 1))
        (tmp_path / "0" / "go").touch()
        handles += [first, second]
        concurrent.futures.wait(handles)
    for step in range(2, 5):
        handle = executor.execute_save(small_state(step), checkpoint_id=f"{tmp_path}/{step}")
        handle.add_done_callback(functools.partial(note, step))
        handles.append(handle)
    for step, handle in enumerate(handles):
        metadata = handle.result(timeout=60)
        assert isinstance(metadata, Metadata)
        assert str(metadata.storage_meta.checkpoint_id).endswith(f"/{step}")  # type: ignore[union-attr]
        assert_loads(f"file://{tmp_path}/{step}", small_state(step))
    assert ended == [0, 1, 2, 3, 4]
    assert executor.pid == pid


def test_the_handle_is_a_future_and_tells_progress_from_the_process(
    executor: ProcessExecutor, tmp_path: Path
) -> None:
    state = {"weight": torch.randn(1 << 20), "step": 1}
    handle = executor.execute_save(state, storage_writer=waiting(tmp_path, "a", saboteurs.WROTE))
    assert isinstance(handle, Future)
    assert handle.staged.done()
    assert handle.running() and not handle.cancel()
    until(lambda: handle.progress.bytes_done >= 4 << 20)
    progress = handle.progress
    assert progress.phase == "writing"
    assert progress.bytes_total == 4 << 20
    assert str(progress.object_name).endswith(".distcp")
    with pytest.raises(TimeoutError):
        handle.result(timeout=0.01)
    (tmp_path / "a" / "go").touch()
    assert handle.result(timeout=60) is handle.result()
    assert handle.progress == Progress(4 << 20, 4 << 20, "done", progress.object_name)
    assert concurrent.futures.wait([handle]).done == {handle}


def test_a_state_that_comes_as_a_future_is_taken_when_it_is_there(
    executor: ProcessExecutor, tmp_path: Path
) -> None:
    staging: Future[dict[str, Any]] = Future()
    handle = executor.execute_save(staging, checkpoint_id=f"{tmp_path}/a")
    assert not handle.staged.done()
    staging.set_result(small_state(7))
    handle.staged.result(timeout=60)
    handle.result(timeout=60)
    assert_loads(f"file://{tmp_path}/a", small_state(7))
    failing: Future[dict[str, Any]] = Future()
    handle = executor.execute_save(failing, checkpoint_id=f"{tmp_path}/b")
    failing.set_exception(ValueError("staging failed"))
    with pytest.raises(ValueError, match="staging failed"):
        handle.result(timeout=60)
    assert isinstance(handle.staged.exception(), ValueError)
    collective: Future[dict[str, Any]] = Future()  # DCP's exception is no Exception
    handle = executor.execute_save(collective, checkpoint_id=f"{tmp_path}/c")
    collective.set_exception(CheckpointException("stage", {}))
    assert isinstance(handle.exception(timeout=60), CheckpointException)


def test_a_state_that_comes_late_keeps_its_turn(executor: ProcessExecutor, tmp_path: Path) -> None:
    """With one snapshot, a state that is there already waits for the one before, and not in its place."""
    staging: Future[dict[str, Any]] = Future()
    first = executor.execute_save(staging, checkpoint_id=f"{tmp_path}/a")
    threading.Timer(0.2, staging.set_result, (small_state(1),)).start()
    second = executor.execute_save(small_state(2), checkpoint_id=f"{tmp_path}/b")
    assert first.done()
    second.result(timeout=60)
    assert_loads(f"file://{tmp_path}/a", small_state(1))
    assert_loads(f"file://{tmp_path}/b", small_state(2))


def test_any_dcp_writer_and_planner_will_do(executor: ProcessExecutor, tmp_path: Path) -> None:
    state = small_state(3)
    for _ in range(2):
        handle = executor.execute_save(
            state, storage_writer=FileSystemWriter(tmp_path / "stock"), planner=DefaultSavePlanner()
        )
        handle.result(timeout=60)
        assert handle.progress.bytes_done == handle.progress.bytes_total > 0
    loaded = {"shared": torch.zeros(40)}
    dcp.load(loaded, storage_reader=FileSystemReader(tmp_path / "stock"), no_dist=True)
    assert torch.equal(loaded["shared"], state["shared"])


@pytest.mark.parametrize(
    "failing", ["set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "resolve_data"]
)
def test_a_planner_that_raises_fails_the_save_with_its_error_and_leaves_nothing(
    executor: ProcessExecutor, tmp_path: Path, failing: str
) -> None:
    pid = executor.pid
    handle = executor.execute_save(
        small_state(1), checkpoint_id=f"{tmp_path}/a", planner=FaultyPlanner(failing)
    )
    error = handle.exception(timeout=60)
    assert "injected into the planner" in str(error)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    executor.execute_save(small_state(1), checkpoint_id=f"{tmp_path}/a").result(timeout=60)
    assert executor.pid == pid


def test_a_busy_executor_waits_skips_or_raises(tmp_path: Path) -> None:
    for on_busy in ("skip", "raise"):
        with ProcessExecutor(save_timeout=60, on_busy=on_busy) as executor:
            first = executor.execute_save(small_state(1), storage_writer=waiting(tmp_path, on_busy))
            if on_busy == "skip":
                handle = executor.execute_save(small_state(2), checkpoint_id=f"{tmp_path}/never")
                assert handle.cancelled()
                with pytest.raises(concurrent.futures.CancelledError):
                    handle.result()
            else:
                with pytest.raises(ExecutorError, match="no snapshot is free"):
                    executor.execute_save(small_state(2), checkpoint_id=f"{tmp_path}/never")
            (tmp_path / on_busy / "go").touch()
            first.result(timeout=60)
            executor.execute_save(small_state(3), checkpoint_id=f"{tmp_path}/{on_busy}-3").result(timeout=60)
    assert not (tmp_path / "never").exists()


def test_a_busy_executor_that_waits_takes_the_state_as_it_is_then(
    executor: ProcessExecutor, tmp_path: Path
) -> None:
    first = executor.execute_save(small_state(1), storage_writer=waiting(tmp_path, "a"))
    threading.Timer(0.2, (tmp_path / "a" / "go").touch).start()
    second = executor.execute_save(small_state(2), checkpoint_id=f"{tmp_path}/b")
    assert first.done()
    second.result(timeout=60)
    assert_loads(f"file://{tmp_path}/b", small_state(2))


def test_two_snapshots_let_a_state_be_taken_while_the_one_before_is_saved(tmp_path: Path) -> None:
    with ProcessExecutor(save_timeout=60, snapshots=2, on_busy="raise") as executor:
        first = executor.execute_save(small_state(1), storage_writer=waiting(tmp_path, "a"))
        second = executor.execute_save(small_state(2), checkpoint_id=f"{tmp_path}/b")
        assert not first.done()
        with pytest.raises(ExecutorError, match="no snapshot is free"):
            executor.execute_save(small_state(3), checkpoint_id=f"{tmp_path}/c")
        (tmp_path / "a" / "go").touch()
        concurrent.futures.wait([first, second], timeout=60)
        assert_loads(f"file://{tmp_path}/a", small_state(1))
        assert_loads(f"file://{tmp_path}/b", small_state(2))


@pytest.mark.parametrize("on_busy", ["skip", "raise"])
def test_ranks_that_are_not_equally_busy_do_as_rank_0_must(
    rank_pool: RankPools, tmp_path: Path, on_busy: str
) -> None:
    """Rank 0's slot is taken; rank 1's would be free but for the rule."""
    pool: RankPool = rank_pool(2)
    root = f"file://{tmp_path}"

    def attempt(rank: int) -> list[str]:
        executor = living(on_busy, save_timeout=60, start_timeout=60, on_busy=on_busy, snapshots=1 + rank)
        outcomes = []
        first = executor.execute_save(small_state(1, rank), storage_writer=waiting(tmp_path, "1"))
        for step in (2, 3):
            try:
                handle = executor.execute_save(small_state(step, rank), checkpoint_id=f"{root}/{step}")
                outcomes.append("skipped" if handle.cancelled() else "saved")
            except ExecutorError:
                outcomes.append("raised")
        (tmp_path / "1" / "go").touch()
        first.result(timeout=60)
        executor.execute_save(small_state(4, rank), checkpoint_id=f"{root}/4").result(timeout=60)
        executors.end(on_busy)
        return outcomes

    expected = {"skip": "skipped", "raise": "raised"}[on_busy]
    assert pool(attempt) == [[expected] * 2] * 2
    assert_loads(f"{root}/4", small_state(4, 1))
    assert not (tmp_path / "2").exists()


def test_a_process_that_was_killed_between_saves_costs_none(tmp_path: Path) -> None:
    with ProcessExecutor(save_timeout=60) as executor:
        executor.warmup()
        pid = executor.pid
        assert pid is not None
        end = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        assert select.select([end], [], [], 30)[0]
        os.close(end)
        executor.execute_save(small_state(1), checkpoint_id=f"{tmp_path}/a").result(timeout=60)
        assert executor.pid != pid
        assert executor.generation == 2


def test_a_dead_process_is_named_with_its_pid_code_and_progress(tmp_path: Path) -> None:
    with ProcessExecutor(save_timeout=60) as executor:
        writer = Saboteur(f"file://{tmp_path}/a", saboteurs.WROTE, saboteurs.EXIT_17, folder=tmp_path)
        handle = executor.execute_save({"weight": torch.ones(1000)}, storage_writer=writer)
        error = handle.exception(timeout=60)
        assert isinstance(error, ExecutorDiedError)
        assert (error.uri, error.rank) == (f"file://{tmp_path}/a", 0)
        assert str(error.object_name).startswith("__0_0.")
        assert "exit code 17" in str(error)
        assert "while writing, 4000 of 4000 bytes done" in error.message
        assert handle.progress.phase == "failed"


def test_the_process_is_of_low_priority_keeps_to_its_processors_and_ignores_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = min(os.sched_getaffinity(0))
    monkeypatch.setenv("CLOUDCKPT_CPUS", str(cpu))
    with ProcessExecutor(save_timeout=60) as executor:
        executor.warmup()
        assert executor.pid is not None
        process = psutil.Process(executor.pid)
        assert process.nice() > psutil.Process().nice()
        for thread in process.threads():
            assert os.sched_getaffinity(thread.id) == {cpu}
            assert os.getpriority(os.PRIO_PROCESS, thread.id) >= 10
        assert os.getpgid(executor.pid) != os.getpgid(0)
        process.send_signal(signal.SIGINT)
        executor.execute_save(small_state(1), checkpoint_id=f"{tmp_path}/a").result(timeout=60)
        assert executor.pid == process.pid


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CLOUDCKPT_CPUS", "zero"),
        ("CLOUDCKPT_CPUS", "4096"),
        ("CLOUDCKPT_CPUS", "3-1"),
        ("CLOUDCKPT_THREADS", "0"),
    ],
)
def test_a_setting_that_cannot_be_kept_is_refused_in_the_trainer(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=name):
        ProcessExecutor()


@pytest.mark.parametrize(
    "arguments",
    [
        {"save_timeout": 0},
        {"start_timeout": -1},
        {"save_timeout": float("inf")},
        {"snapshots": 3},
        {"on_busy": "no"},
    ],
)
def test_an_argument_that_cannot_be_used_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        ProcessExecutor(**arguments)


def test_what_can_not_be_saved_at_all_is_refused_at_once(executor: ProcessExecutor, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nothing to save to"):
        executor.execute_save({})
    executor.execute_save({"a": 1}, checkpoint_id=f"{tmp_path}/first", no_dist=True).result(timeout=60)
    another: Any = object()
    with pytest.raises(ConfigurationError, match="one process group"):
        executor.execute_save({"a": 1}, checkpoint_id=f"{tmp_path}/a", process_group=another)
    unpicklable = FileSystemWriter(tmp_path)
    unpicklable.hook = lambda: None  # type: ignore[attr-defined]
    error = executor.execute_save({"a": 1}, storage_writer=unpicklable).exception(timeout=60)
    assert isinstance(error, ConfigurationError)
    assert "can't be sent to the checkpoint process" in str(error)


def test_an_empty_state_and_one_without_tensors_are_saved(executor: ProcessExecutor, tmp_path: Path) -> None:
    executor.execute_save({"step": 3}, checkpoint_id=f"{tmp_path}/a").result(timeout=60)
    loaded = {"step": 0}
    dcp.load(loaded, storage_reader=cloudckpt.StorageReader(f"{tmp_path}/a"), no_dist=True)
    assert loaded == {"step": 3}
    executor.execute_save({}, checkpoint_id=f"{tmp_path}/b").result(timeout=60)
    assert (tmp_path / "b" / ".metadata").exists()


def test_a_closed_executor_has_waited_for_its_saves_and_takes_no_more(tmp_path: Path) -> None:
    executor = ProcessExecutor(save_timeout=60)
    handle = executor.execute_save(small_state(1), checkpoint_id=f"{tmp_path}/a")
    executor.close()
    assert handle.done()
    assert handle.exception() is None
    executor.close()
    with pytest.raises(ExecutorError, match="closed"):
        executor.execute_save(small_state(2), checkpoint_id=f"{tmp_path}/b")


def test_closing_is_bounded_and_tells_the_save_that_it_gave_up(tmp_path: Path) -> None:
    executor = ProcessExecutor(save_timeout=600)
    executor.warmup()
    pid = executor.pid
    handle = executor.execute_save(small_state(1), storage_writer=waiting(tmp_path, "a"))
    queued = threading.Thread(target=executor.close, args=(0.2,))
    queued.start()
    queued.join(60)
    assert not queued.is_alive()
    assert isinstance(handle.exception(timeout=1), ExecutorError)
    assert "closed" in str(handle.exception())
    until(lambda: not psutil.pid_exists(pid or 0))
    assert not (tmp_path / "a" / ".metadata").exists()
