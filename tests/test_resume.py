"""A job of two ranks that is killed again and again resumes from a whole checkpoint each time."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.run import Run

RANKS = 2
ROOT = Path(__file__).parent
PATIENCE = 120.0
"""Seconds that a job may take until it commits its next step."""


class Job:
    """Both ranks, in one process group; what rank 0 says is read on the way."""

    def __init__(self, uri: str, meeting: Path, log: Path) -> None:
        self._ranks: list[subprocess.Popen[str]] = []
        self._said: queue.Queue[tuple[str, int]] = queue.Queue()
        self.told = -1
        """The last step that it has told of."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        for rank in range(RANKS):
            command = [sys.executable, "-m", "support.resumer", uri, str(meeting), str(rank), str(RANKS)]
            with log.open("a") as errors:
                process = subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=environment,
                    process_group=self._ranks[0].pid if self._ranks else 0,
                )
            self._ranks.append(process)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        out = self._ranks[0].stdout
        assert out is not None
        for line in out:
            word, _, step = line.partition(" ")
            self.told = int(step)
            self._said.put((word, self.told))
        self._said.put(("ended", 0))

    def hear(self, word: str) -> int:
        said, step = self._said.get(timeout=PATIENCE)
        assert said == word, said
        return step

    def kill(self) -> None:
        """Kill both, and wait until their checkpoint processes are gone as well."""
        family = [one for rank in self._ranks for one in children_of(rank.pid)]
        os.killpg(self._ranks[0].pid, signal.SIGKILL)
        for rank in self._ranks:
            rank.wait()
            assert rank.stdout is not None
        self._reader.join()
        for rank in self._ranks:
            if rank.stdout is not None:
                rank.stdout.close()
        _, alive = psutil.wait_procs(family, timeout=PATIENCE)
        assert not alive


def children_of(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@contextlib.contextmanager
def job(uri: str, folder: Path, number: int) -> Iterator[Job]:
    running = Job(uri, folder / f"meeting-{number}", folder / "log")
    try:
        yield running
    finally:
        running.kill()


def kill_and_resume(folder: Path, times: int, seed: int) -> None:
    rng = random.Random(seed)
    uri = f"file://{folder}/run"
    run = Run(Target.parse(uri))
    committed = -1
    for number in range(times):
        with job(uri, folder, number) as running:
            resumed = running.hear("resumed")
            assert resumed == committed
            for _ in range(rng.randrange(1, 5)):
                running.hear("committed")
            threading.Event().wait(rng.random() * 0.15)  # somewhere in the next save, wherever it is then
        steps = run.steps()
        assert 1 <= len(steps) <= 3
        # What was told to be committed is there; one more may be, that nobody could tell of.
        assert max(steps) in (running.told, running.told + 1)
        assert all(cloudckpt.verify(run.at(step).uri).ok for step in steps)
        committed = max(steps)


def test_a_job_that_is_killed_at_random_always_resumes_from_a_whole_checkpoint(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, times=2, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_job_that_is_killed_thirty_times_always_resumes_from_a_whole_checkpoint(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, times=30, seed=2)
