"""However a trainer ends, its checkpoint process ends with it, and no save is lost in silence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support import saboteurs
from support.executors import assert_loads, small_state, until
from support.trainers import ROOT, TrainerProcess, gone


@pytest.fixture
def trainers(tmp_path: Path) -> Iterator[Any]:
    with ExitStack() as stack:

        def start(world_size: int = 1, **executor: Any) -> list[TrainerProcess]:
            group: dict[str, Any] = {}
            if world_size > 1:
                group = {"init_method": f"file://{tmp_path}/meeting", "world_size": world_size}
            made = [
                stack.enter_context(TrainerProcess(tmp_path, rank=rank, executor=executor, **group))
                for rank in range(world_size)
            ]
            return [trainer.started() for trainer in made]

        yield start


@pytest.mark.parametrize("with_a_fork", [False, True])
def test_a_killed_trainer_takes_its_process_along_which_then_never_commits(
    trainers: Any, tmp_path: Path, with_a_fork: bool
) -> None:
    (trainer,) = trainers(save_timeout=100.0)
    trainer.ask("warmup")
    worker = trainer.ask("fork") if with_a_fork else None
    process = trainer.ask("pid")
    trainer.ask("begin", 1, saboteurs.PUT, saboteurs.WAIT)
    until((tmp_path / "reached").exists)
    trainer.kill()
    until(lambda: gone(process))
    (tmp_path / "go").touch()
    if worker is not None:
        os.kill(worker, signal.SIGKILL)
    assert not (tmp_path / "step-1" / ".metadata").exists()


def test_a_trainer_killed_on_one_rank_fails_the_save_on_the_others(trainers: Any, tmp_path: Path) -> None:
    first, second = trainers(2, save_timeout=100.0, start_timeout=60.0)
    for trainer in (first, second):
        trainer.tell("warmup")
    for trainer in (first, second):
        trainer.answer()
    process = second.ask("pid")
    for trainer in (first, second):
        trainer.ask("begin", 1, saboteurs.WROTE, saboteurs.WAIT, 1)
    until((tmp_path / "reached").exists)
    second.kill()
    until(lambda: gone(process))
    outcome = first.ask("result")
    assert outcome["error"] == "ExecutorError"
    assert "another rank" in outcome["said"]
    assert not (tmp_path / "step-1" / ".metadata").exists()


def test_a_script_that_comes_to_its_end_waits_for_its_save(trainers: Any, tmp_path: Path) -> None:
    (trainer,) = trainers(save_timeout=100.0)
    trainer.ask("begin", 1, saboteurs.WROTE, saboteurs.WAIT)
    trainer.tell("leave")
    until((tmp_path / "reached").exists)
    (tmp_path / "go").touch()
    assert trainer.process.wait(60) == 0
    assert_loads(f"file://{tmp_path}/step-1", small_state(1))


def test_a_script_that_comes_to_its_end_with_a_frozen_process_ends_and_says_what_was_lost(
    trainers: Any, tmp_path: Path
) -> None:
    (trainer,) = trainers(save_timeout=6.0)
    trainer.ask("begin", 1, saboteurs.WROTE, saboteurs.STOP)
    trainer.tell("leave")
    assert trainer.process.wait(60) == 0
    assert "step-1 failed: SaveTimeoutError" in trainer.errors()


def test_ranks_that_come_to_their_end_one_after_another_all_learn_of_the_last_save(
    trainers: Any, tmp_path: Path
) -> None:
    """Rank 0's trainer holds the store that the others meet in."""
    first, second = trainers(2, save_timeout=60.0, start_timeout=60.0)
    for trainer in (first, second):
        trainer.ask("begin", 1)
    first.tell("leave")
    assert second.ask("result") == {"error": None}
    assert first.process.wait(60) == 0
    second.tell("leave")
    assert second.process.wait(60) == 0


def test_ctrl_c_reaches_the_trainer_alone(trainers: Any, tmp_path: Path) -> None:
    (trainer,) = trainers(save_timeout=100.0)
    trainer.ask("warmup")
    process = trainer.ask("pid")
    trainer.ask("begin", 1, saboteurs.WROTE, saboteurs.WAIT)
    until((tmp_path / "reached").exists)
    trainer.tell("result")
    until((tmp_path / "waiting-0").exists)
    trainer.process.send_signal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        trainer.answer()
    assert not gone(process)
    (tmp_path / "go").touch()
    assert trainer.ask("result") == {"error": None}
    assert_loads(f"file://{tmp_path}/step-1", small_state(1))


@pytest.mark.soak
def test_a_host_that_was_suspended_for_longer_than_a_save_may_take_goes_on_with_it(
    trainers: Any, tmp_path: Path
) -> None:
    (trainer,) = trainers(save_timeout=20.0)  # which reaching the write must not take
    trainer.ask("warmup")
    both = [trainer.pid, trainer.ask("pid")]
    trainer.ask("begin", 1, saboteurs.WROTE, saboteurs.WAIT)
    until((tmp_path / "reached").exists)
    for pid in both:
        os.kill(pid, signal.SIGSTOP)
    resumed = time.monotonic() + 24
    until(lambda: time.monotonic() > resumed)
    (tmp_path / "go").touch()
    for pid in both:
        os.kill(pid, signal.SIGCONT)
    assert trainer.ask("result") == {"error": None}


SCRIPT = """
import sys, torch
from cloudckpt.executor import ProcessExecutor
print("script runs", flush=True)

class Settings:
    rate = 3

executor = ProcessExecutor(save_timeout=60)
state = {"weight": torch.ones(5), "settings": Settings() if sys.argv[2] == "own" else 1}
executor.execute_save(state, checkpoint_id=sys.argv[1]).result(timeout=60)
"""


@pytest.mark.parametrize("value", ["plain", "own"])
def test_a_script_without_a_main_guard_is_run_again_only_for_a_class_of_its_own_and_told_so(
    tmp_path: Path, value: str
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    ended = subprocess.run(
        [sys.executable, script, tmp_path / "saved", value],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ended.stdout.count("script runs") == (1 if value == "plain" else 2)
    if value == "plain":
        assert ended.returncode == 0, ended.stderr
        assert (tmp_path / "saved" / ".metadata").exists()
    else:
        assert ended.returncode == 1
        assert 'under if __name__ == "__main__"' in ended.stderr
        assert not (tmp_path / "saved").exists()
