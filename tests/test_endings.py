"""Each way to end: what docs/endings.md promises for it is what happens, and nothing is left behind."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from support.endings import Ending, ended, pending, steps

BEGIN = """
checkpointer = cloudckpt.Checkpointer(URI, progress=False, preemption_grace=GRACE)
handle = checkpointer.async_save(1, state)
"""
UNDER_WAY = 'while handle.progress.phase == "waiting":\n    time.sleep(0.001)\n'
"""Wait until the checkpoint process saves."""
soak = pytest.mark.soak


def run(folder: Path, body: str, how: str = "file", *, grace: float | None = 25.0) -> Ending:
    return ended(folder, body, how, setup=BEGIN.replace("GRACE", repr(grace)))


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        pytest.param("", 0, "", id="return", marks=soak),
        pytest.param(
            "raise ValueError('of the script')\n", 1, "ValueError: of the script", id="exception", marks=soak
        ),
        pytest.param("sys.exit(3)\n", 3, "", id="sys.exit", marks=soak),
        pytest.param(
            "with checkpointer:\n    raise ValueError('of the block')\n",
            1,
            "ValueError: of the block",
            id="exception in a with block",
            marks=soak,
        ),
        pytest.param(
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n",
            -signal.SIGINT,
            "KeyboardInterrupt",
            id="Ctrl-C",
        ),
    ],
)
def test_an_end_that_python_takes_part_in_finishes_the_save(
    tmp_path: Path, body: str, status: int, said: str
) -> None:
    end = run(tmp_path, body)
    assert end.status == status, end.errors
    assert said in end.errors
    assert (end.steps, end.left, end.pending) == ([1], [], [])


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, id="SIGTERM"), pytest.param(signal.SIGUSR1, id="SIGUSR1")]
)
@pytest.mark.soak
def test_a_signal_that_ends_the_job_has_the_next_step_saved_as_the_last(
    tmp_path: Path, number: signal.Signals
) -> None:
    body = f"""
os.kill(os.getpid(), {int(number)})
for step in range(2, 1000):
    checkpointer.async_save(step, state)
"""
    end = run(tmp_path, body)
    assert end.status == 128 + number, end.errors
    # The notice comes on a thread: the call in which it is noticed is the second or a later one.
    assert end.steps == [*range(1, len(end.steps) + 1)] and 2 <= len(end.steps) < 100
    assert (end.left, end.pending) == ([], [])


@pytest.mark.soak
def test_a_signal_without_a_grace_time_ends_the_process_at_once(tmp_path: Path) -> None:
    end = run(tmp_path, "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)\n", grace=None)
    assert end.status == -signal.SIGTERM
    assert (end.steps, end.left) == ([], [])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)\n", -signal.SIGKILL, id="SIGKILL"),
        pytest.param("os._exit(7)\n", 7, id="os._exit", marks=soak),
        pytest.param(
            "process = checkpointer._executor.pid\nos.kill(os.getpid(), signal.SIGKILL)\n"
            "os.kill(process, signal.SIGKILL)\n",
            -signal.SIGKILL,
            id="both are killed",
            marks=soak,
        ),
    ],
)
def test_an_end_that_python_takes_no_part_in_commits_nothing_and_the_next_save_clears(
    tmp_path: Path, body: str, status: int
) -> None:
    end = run(tmp_path, UNDER_WAY + body)
    assert end.status == status
    assert end.left == []
    (tmp_path / "tmp").rmdir()
    next_start = ended(
        tmp_path,
        "with cloudckpt.Checkpointer(URI, progress=False, overwrite=True) as checkpointer:\n"
        "    checkpointer.save(1, state)\n",
    )
    assert next_start.status == 0, next_start.errors
    assert (next_start.steps, next_start.left, next_start.pending) == ([1], [], [])


def test_a_killed_checkpoint_process_fails_its_save_alone(tmp_path: Path) -> None:
    body = """
os.kill(checkpointer._executor.pid, signal.SIGKILL)
try:
    handle.result()
except cloudckpt.ExecutorDiedError as error:
    print("died", error.rank)
print(checkpointer.save(2, state).step)
"""
    end = run(tmp_path, UNDER_WAY + body)
    assert (end.status, end.out) == (0, "died 0\n2\n"), end.errors
    assert end.steps[-1] == 2
    assert (end.left, end.pending) == ([], [])


FORKS = """
def child():
    mine = cloudckpt.Checkpointer(URI + "-child", progress=False)
    mine.async_save(5, state)

def refused(call):
    try:
        call()
    except cloudckpt.ExecutorError as error:
        print("forked from process" in str(error), "Make a Checkpointer" in str(error), flush=True)

def misuse():
    checkpointer.close()
    for call in (
        lambda: checkpointer.save(9, state),
        lambda: checkpointer.async_save(9, state),
        checkpointer.wait,
        checkpointer.warmup,
        checkpointer.preempt,
        lambda: checkpointer.load(state),
        handle.result,
        handle.staged.result,
    ):
        refused(call)

import multiprocessing
fork = multiprocessing.get_context("fork")
for run in (child, misuse):
    process = fork.Process(target=run)
    process.start()
    process.join()
    print(process.exitcode, flush=True)
later.set_result({"w": state["weights"]})
handle.result()
print("done", flush=True)
"""

UNTIL_CHILDREN_END = """
from concurrent.futures import Future
later = Future()
checkpointer = cloudckpt.Checkpointer(URI, progress=False)
handle = checkpointer._executor.execute_save(later, checkpoint_id=URI + "/late")
checkpointer._saves.add(0, handle)
"""
"""A save that is under way until its state comes."""


def test_forked_children_finish_their_own_saves_and_are_refused_their_parents(tmp_path: Path) -> None:
    end = ended(tmp_path, FORKS, setup=UNTIL_CHILDREN_END)
    lines = end.out.splitlines()
    assert lines[0] == "0", end.errors
    assert lines[1:9] == ["True True"] * 8, end.out + end.errors
    assert lines[9:] == ["0", "done"]
    assert steps(tmp_path / "run-child") == [5]
    assert pending(tmp_path / "run-child") == []
    assert end.left == []


@pytest.mark.parametrize("how", ["stdin", pytest.param("-c", marks=soak), pytest.param("-i", marks=soak)])
def test_a_script_without_a_file_saves_and_a_class_of_its_own_is_refused(tmp_path: Path, how: str) -> None:
    body = """
from cloudckpt.executor import ProcessExecutor
class Settings: pass

executor = ProcessExecutor()
handle = executor.execute_save({"of": {"mine": Settings()}}, checkpoint_id=URI + "-2")
print(handle.exception())
"""
    end = run(tmp_path, body, how)
    assert end.status == 0, end.errors
    assert "the value at 'of.mine' needs the class Settings, which is defined in a notebook" in end.out
    assert "Put the class or function into a module" in end.out
    assert (end.steps, end.left, end.pending) == ([1], [], [])
