"""A torchrun job as a driver sees it: the lines it prints, and a way to kill it without warning."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

RANKS = 2
_TRAIN = Path(__file__).with_name("train.py")
_WORDS = frozenset({"processes", "serves", "resumed", "step", "saving", "saved", "not-saved"})

Event = tuple[str, ...]
"""The words of one line that train.py printed, such as ``("step", "3", "loss", "2.5")``."""


class JobFailedError(Exception):
    """The job ended by itself with an error; the message is the end of what it printed."""


class Job:
    """Two ranks of train.py under torchrun. Leaving the context leaves no process behind."""

    def __init__(self, uri: str, *, steps: int, every: int) -> None:
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._ranks: tuple[int, ...] = ()
        self._servers: dict[int, tuple[int, int]] = {}
        self._saving: int | None = None
        self._killed = False
        self._rest: deque[str] = deque(maxlen=100)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        train = [str(_TRAIN), f"--uri={uri}", f"--steps={steps}", f"--every={every}"]
        self._agent = subprocess.Popen(
            [sys.executable, *torchrun, f"--nproc-per-node={RANKS}", *train],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="job-output", daemon=True)
        self._reader.start()

    def events(self) -> Iterator[Event]:
        """Yield what the job says, as it says it, until it ends or is killed.

        Raises:
            JobFailedError: it ended with an error.
        """
        while (event := self._events.get()) is not None:
            yield event
        self._events.put(None)  # for whoever asks again
        if self._agent.wait() and not self._killed:
            raise JobFailedError("\n".join(self._rest))

    def saving(self, step: int) -> bool:
        """Tell whether the save of this step is still under way, by the last that the job said."""
        return self._saving == step

    def generation(self, rank: int) -> int:
        """Return the generation of the rank's checkpoint process."""
        return self._servers[rank][1]

    def kill_checkpoint_process(self, rank: int) -> int:
        """SIGKILL the checkpoint process of a rank, and return its id."""
        pid, _ = self._servers[rank]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return pid

    def kill(self) -> None:
        """SIGKILL torchrun and every rank, and return when all of them are gone.

        torchrun gives each rank a session of its own, so that killing torchrun's group alone would leave
        the ranks running. A checkpoint process ends with its rank. The pipe that all share ends with the
        last of them.
        """
        self._killed = True
        for group in (self._agent.pid, *self._ranks):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self._agent.wait()
        self._reader.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._agent.poll() is None and not self._ranks:
            self._agent.terminate()  # only torchrun knows its ranks yet: it ends them on SIGTERM
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._agent.wait(timeout=30)
        self.kill()

    def _read(self) -> None:
        assert self._agent.stdout is not None  # noqa: S101 - for type checkers: it was given PIPE
        try:
            with self._agent.stdout as lines:
                for line in lines:
                    words = tuple(line.split())
                    if not words or words[0] not in _WORDS:
                        self._rest.append(line.rstrip())
                        continue
                    self._note(words)
                    self._events.put(words)
        finally:
            self._saving = None
            self._events.put(None)

    def _note(self, words: Event) -> None:
        match words:
            case ("processes", *pids):
                self._ranks = tuple(map(int, pids))
            case ("serves", rank, pid, "generation", generation):
                self._servers[int(rank)] = int(pid), int(generation)
            case ("saving", step):
                self._saving = int(step)
            case ("saved", step, *_) | ("not-saved", _, step, *_) if self.saving(int(step)):
                self._saving = None
            case _:
                pass


def _environment() -> dict[str, str]:
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    return {
        **os.environ,
        "GLOO_SOCKET_IFNAME": loopback,  # else gloo wants this machine's name to resolve
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONUNBUFFERED": "1",
    }
