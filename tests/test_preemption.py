"""A job that is told to end saves a last step on every rank, or gives that up; and it ends."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.run import Run
from support.places import Place

ROOT = Path(__file__).parent
RANKS = 2
PATIENCE = 120.0
"""Seconds that whatever is waited for may take on a busy machine."""
ROOMY, SHORT = "60", "5"
"""Grace times."""


class Ranks:
    """The processes that were started for a job, and what all of its ranks say."""

    def __init__(self, uri: str, grace: str, how: str, folder: Path, *, torchrun: bool) -> None:
        self._said: queue.Queue[list[str]] = queue.Queue()
        self.pids: list[int] = []
        self.last: list[list[str]] = []
        """What each rank said of its last step."""
        program = ["-m", "support.preempted", uri, grace, how]
        commands = [
            [sys.executable, *program, str(folder / "meeting"), str(rank), str(RANKS)]
            for rank in range(RANKS)
        ]
        if torchrun:
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
            commands = [[sys.executable, *launch, *program]]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self.log = folder / "log"
        with self.log.open("a") as errors:
            self.processes = [
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
                for command in commands
            ]
        self._readers = [threading.Thread(target=self._read, args=(one,)) for one in self.processes]
        for reader in self._readers:
            reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._said.put(line.split())

    def hear(self, word: str, times: int = 1) -> list[str]:
        """The next line that begins with a word, or the last of several."""
        said: list[str] = []
        while times:
            said = self._said.get(timeout=PATIENCE)
            if said[0] == "pid":
                self.pids.append(int(said[1]))
            if said[0] == "last":
                self.last.append(said[1:])
            times -= said[0] == word
        return said

    def tell(self, signals: Sequence[int], number: int) -> None:
        for pid in signals:
            os.kill(pid, number)

    def ended(self) -> list[int]:
        """The exit status of what was started, once all of it is gone, checkpoint processes as well."""
        family = [
            child for one in self.processes for child in psutil.Process(one.pid).children(recursive=True)
        ]
        statuses = [one.wait(PATIENCE) for one in self.processes]
        for reader in self._readers:
            reader.join()
        while not self._said.empty():
            self.hear(self._said.queue[0][0])
        _, alive = psutil.wait_procs(family, timeout=PATIENCE)
        assert not alive
        return statuses


@contextlib.contextmanager
def job(
    folder: Path, *, grace: str = ROOMY, how: str = "steps", torchrun: bool = False
) -> Iterator[tuple[Ranks, Run]]:
    uri = f"file://{folder}/run"
    ranks = Ranks(uri, grace, how, folder, torchrun=torchrun)
    try:
        yield ranks, Run(Target.parse(uri))
    finally:
        for process in ranks.processes:
            for child in _children(process.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def loaded(run: Run, step: int) -> None:
    """Every rank's part of a step is of that step."""
    state = {"weights": torch.zeros(512, 64), "step": -1}
    with cloudckpt.Checkpointer(run.target.uri) as checkpointer:
        assert checkpointer.load(state) == step == state["step"]
    assert isinstance(state["weights"], torch.Tensor) and bool((state["weights"] == float(step)).all())


@pytest.mark.parametrize(
    ("number", "told"),
    [(signal.SIGTERM, [1]), pytest.param(signal.SIGUSR1, [0, 1], marks=pytest.mark.soak)],
)
def test_all_ranks_commit_the_same_last_step_and_end(
    tmp_path: Path, number: signal.Signals, told: list[int]
) -> None:
    with job(tmp_path) as (ranks, run):
        ranks.hear("step", times=20)
        ranks.tell([ranks.processes[rank].pid for rank in told], number)
        assert ranks.ended() == [128 + number] * RANKS
        (first, how), other = ranks.last
        assert how == "committed" and other == [first, how]
    assert run.steps() == [int(first)]
    loaded(run, int(first))


def test_torchrun_told_to_end_has_its_workers_commit_a_last_step(tmp_path: Path) -> None:
    with job(tmp_path, torchrun=True) as (ranks, run):
        ranks.hear("step", times=20)
        ranks.tell([ranks.processes[0].pid], signal.SIGTERM)
        ranks.ended()
        (first, how), other = ranks.last
        assert how == "committed" and other == [first, how]
    loaded(run, int(first))


@pytest.mark.soak
def test_a_signal_to_every_process_of_a_job_is_the_trainers_to_act_on(tmp_path: Path) -> None:
    """Slurm tells the checkpoint processes, too."""
    with job(tmp_path) as (ranks, run):
        ranks.hear("step", times=20)
        trainers = [one.pid for one in ranks.processes]
        savers = [child.pid for one in trainers for child in psutil.Process(one).children(recursive=True)]
        assert len(savers) == RANKS
        ranks.tell([*savers, *trainers], signal.SIGTERM)
        ranks.tell([*savers, *trainers], signal.SIGUSR1)
        ranks.ended()
        assert [how for _, how in ranks.last] == ["committed"] * RANKS
    loaded(run, int(ranks.last[0][0]))


def test_a_save_that_does_not_end_in_time_is_given_up(tmp_path: Path) -> None:
    with job(tmp_path, grace=SHORT) as (ranks, run):
        ranks.hear("step", times=20)
        trainers = [one.pid for one in ranks.processes]
        (saver,) = psutil.Process(trainers[1]).children(recursive=True)
        os.kill(saver.pid, signal.SIGSTOP)
        ranks.tell(trainers[:1], signal.SIGTERM)
        assert ranks.ended() == [128 + signal.SIGTERM] * RANKS
        assert [how for _, how in ranks.last] == ["given-up"] * RANKS
    assert run.steps() == []
    cloudckpt.collect_garbage(run.target, older_than=timedelta(0), silent_for=timedelta(0))
    assert Place.in_folder(tmp_path / "run").visible() == set()


@pytest.mark.parametrize("how", ["slow", pytest.param("stuck", marks=pytest.mark.soak)])
def test_a_step_that_does_not_end_in_time_is_given_up(tmp_path: Path, how: str) -> None:
    with job(tmp_path, grace=SHORT, how=how) as (ranks, run):
        ranks.hear("step", times=2 * 3)
        ranks.tell([ranks.processes[1].pid], signal.SIGTERM)
        ranks.ended()
        assert ["None", "given-up"] in ranks.last
    assert run.steps() == []


def script(folder: Path, body: str, arguments: str = "") -> subprocess.CompletedProcess[str]:
    """Run a script of a single process, and have its output."""
    text = f"""
import os, signal, sys, threading, time
import cloudckpt, torch

if __name__ == "__main__":
    checkpointer = cloudckpt.Checkpointer({str(folder / "run")!r}, {arguments})
    state = {{"t": torch.ones(8)}}
{body}
"""
    path = folder / "script.py"
    path.write_text(text)
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def test_a_process_of_its_own_saves_its_next_step(tmp_path: Path) -> None:
    ran = script(
        tmp_path,
        """
    with checkpointer:
        for step in range(10**6):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            checkpointer.async_save(step, state)
""",
        "every_steps=10**9",
    )
    assert ran.returncode == 128 + signal.SIGTERM, ran.stderr
    assert len(Run(Target.parse(str(tmp_path / "run"))).steps()) == 2  # step 0, and the last


def test_a_platform_may_tell_without_a_signal_and_the_end_may_be_caught(tmp_path: Path) -> None:
    ran = script(
        tmp_path,
        """
    with checkpointer:
        checkpointer.save(0, state)
        threading.Thread(target=checkpointer.preempt).start()
        try:
            for step in range(1, 10**6):
                checkpointer.save(step, state)
        except cloudckpt.Preempted as end:
            print(end.signal, end.code, end.info.step == end.step == step)
""",
    )
    assert (ran.returncode, ran.stdout) == (0, "SIGTERM 143 True\n"), ran.stderr


def test_a_signal_that_no_save_came_after_ends_the_process_all_the_same(tmp_path: Path) -> None:
    ran = script(
        tmp_path,
        """
    with checkpointer:
        checkpointer.async_save(0, state)
        os.kill(os.getpid(), signal.SIGUSR1)
    print("never")
""",
    )
    assert (ran.returncode, ran.stdout) == (-signal.SIGUSR1, ""), ran.stderr
    assert Run(Target.parse(str(tmp_path / "run"))).steps() == [0]


@pytest.mark.parametrize("grace", [25.0, None])
def test_handlers_of_others_are_left_alone(tmp_path: Path, grace: float | None) -> None:
    told: list[int] = []

    def handler(number: int, _: object) -> None:
        told.append(number)

    former = signal.signal(signal.SIGTERM, handler)
    try:
        with cloudckpt.Checkpointer(tmp_path / "run", preemption_grace=grace) as checkpointer:
            signal.raise_signal(signal.SIGTERM)
            checkpointer.save(1, {"t": torch.ones(8)})
            assert signal.getsignal(signal.SIGTERM) is handler
            assert (signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL) == (grace is None)
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, former)
    assert told == [signal.SIGTERM]


def test_a_forked_child_dies_of_its_signal(tmp_path: Path) -> None:
    ran = script(
        tmp_path,
        """
    with checkpointer:
        child = os.fork()
        if not child:
            time.sleep(600)
        os.kill(child, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(checkpointer.save(1, state).step)
""",
    )
    assert (ran.returncode, ran.stdout) == (0, "-15\n1\n"), ran.stderr


def test_without_a_grace_time_nobody_can_be_told(tmp_path: Path) -> None:
    with (
        cloudckpt.Checkpointer(tmp_path / "run", preemption_grace=None) as checkpointer,
        pytest.raises(cloudckpt.ConfigurationError, match="preemption_grace"),
    ):
        checkpointer.preempt()


def test_the_end_travels_whole() -> None:
    end = pickle.loads(pickle.dumps(cloudckpt.Preempted("SIGUSR1", 7)))
    assert (end.signal, end.step, end.info, end.code) == ("SIGUSR1", 7, None, 138)
