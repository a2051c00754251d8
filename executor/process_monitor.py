"""Waiting for the checkpoint process: its answer, its death, its deadline, or the other ranks' result."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from multiprocessing import connection
from typing import TypeVar

from cloudckpt.backends.errors import ExecutorDiedError, ExecutorError, SaveTimeoutError
from cloudckpt.backends.system import descriptors
from cloudckpt.executor.coordination.consensus import SaveAttempt
from cloudckpt.executor.messages import Answer, Ready
from cloudckpt.executor.progress import (
    MAY_BE_COMMITTED,
    Progress,
    ProgressBoard,
    Reading,
    whether_committed,
)
from cloudckpt.executor.worker_process import CheckpointProcess, exit_words

M = TypeVar("M", Ready, Answer)

_TICK = 1.0
"""Seconds between looks at the signs of life, while a save goes on."""

_SILENT = 3.0
"""Seconds without a sign of life, one a second being usual, after which a process is called silent."""

_FROZEN = 60.0
"""Seconds without a sign of life after which a process is given up before its deadline."""

_PATIENCE = 2.0
"""Seconds that a rank whose process lives leaves the others at the deadline: theirs may say what is wrong."""


class Decided(Exception):
    """The attempt has a result already: another rank's."""


class Alarm:
    """A pipe that wakes the supervisor."""

    def __init__(self) -> None:
        self._read, self._write = descriptors.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._closing = threading.Lock()
        self._closed = False

    def fileno(self) -> int:
        return self._read

    def ring(self) -> None:
        """Wake the waiting thread, if there is one: its descriptor may be another file's by now."""
        with self._closing:
            if self._closed:
                return
            try:
                os.write(self._write, b"!")
            except BlockingIOError:
                return  # it rings already

    def wait(self, timeout: float) -> None:
        """Wait for a ring, for at most ``timeout`` seconds."""
        connection.wait([self.fileno()], timeout)

    def hush(self) -> None:
        """Make ready for the next ring."""
        try:
            while os.read(self._read, 4096):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        """Give both descriptors back."""
        with self._closing:
            self._closed = True
            os.close(self._read)
            os.close(self._write)


class ProcessMonitor:
    """The watch over one attempt on this rank."""

    def __init__(
        self,
        process: CheckpointProcess,
        attempt: SaveAttempt,
        board: ProgressBoard,
        alarm: Alarm,
        *,
        rank: int,
        save: int,
        uri: str | None,
    ) -> None:
        self._process = process
        self._attempt = attempt
        self._board = board
        self._alarm = alarm
        self._rank = rank
        self._save = save
        self._uri = uri
        self.abandoned = False

    def expect(self, kind: type[M], timeout: float) -> M:
        """Return the process's next message of this kind.

        Raises:
            Decided: another rank has decided the attempt.
            ExecutorDiedError: the process ended.
            SaveTimeoutError: ``timeout`` seconds passed, or the process is frozen.
            ExecutorError: the executor is being closed.
        """
        began = woke = time.monotonic()
        while True:
            now = time.monotonic()
            # A host that was suspended, or too busy for this thread, was so for the process too.
            began += max(0.0, now - woke - 2 * _TICK)
            woke = now
            if self._attempt.result is not None:
                raise Decided
            if self.abandoned:
                raise ExecutorError(
                    "the executor was closed before the save ended", uri=self._uri, rank=self._rank
                )
            message = self._received(kind)
            if message is not None:
                return message
            self._check_time(began, timeout)
            connection.wait([*self._process.waitables, self._alarm.fileno()], _TICK)
            self._alarm.hush()

    def _received(self, kind: type[M]) -> M | None:
        alive = self._process.alive  # before the message: what it sent last is read first
        try:
            message = self._process.receive()
        except (EOFError, OSError):
            raise self.died() from None
        if isinstance(message, kind):
            return message
        if message is None and not alive:
            raise self.died()
        return None

    def died(self) -> ExecutorDiedError:
        """Return the error for a process that has ended."""
        reading = self._reading()
        code = self._process.exit_code(_TICK)
        killer = self._process.killer() if code == -signal.SIGKILL else None
        memory = f", as {killer} ran out of memory," if killer else ""
        cure = "Give the job more memory, or lower memory_limit. " if killer else ""
        return ExecutorDiedError(
            f"the checkpoint process of rank {self._rank} (pid {self._process.pid}) "
            f"{exit_words(code)}{memory} {_where(reading)}",
            uri=self._uri,
            object_name=reading.progress.object_name,
            rank=self._rank,
            hint=f"{cure}Training goes on, and the next save starts a new process"
            + whether_committed(reading.progress),
        )

    def _reading(self) -> Reading:
        """Return the board's state for this save, which may not have started there."""
        reading = self._board.read()
        if reading.save == self._save:
            return reading
        return replace(reading, progress=Progress(0, 0, "waiting" if self._process.serves else "starting"))

    def _check_time(self, began: float, timeout: float) -> None:
        now = time.monotonic()
        reading = self._reading()
        silence = now - max(reading.beat, began) if self._process.serves else 0.0
        overdue = now - began - timeout
        if overdue < 0 and silence < _FROZEN:
            return
        if silence < _SILENT and overdue < _PATIENCE:
            return
        if not self._process.serves:
            raise ExecutorError(
                f"the checkpoint process of rank {self._rank} could not start and meet the others "
                f"within {timeout:g} s",
                uri=self._uri,
                rank=self._rank,
                hint="Look at the other ranks' errors, and whether every rank's host can reach every other's "
                "(interface= or CLOUDCKPT_INTERFACE names the interface), or raise start_timeout; the next "
                "save tries again",
            )
        life = (
            f"has shown no sign of life for {silence:.1f} s (stopped, or starved)"
            if silence >= _SILENT
            else "is alive: the store or another rank's process may be cut off or slow"
        )
        raise SaveTimeoutError(
            f"the save did not end within {min(timeout, now - began):g} s: the checkpoint process of rank "
            f"{self._rank} (pid {self._process.pid}) {life}, {_where(reading)}, "
            f"last progress {now - reading.advanced:.1f} s ago",
            uri=self._uri,
            object_name=reading.progress.object_name,
            rank=self._rank,
            hint="Raise save_timeout if saves take longer than that; the next save starts a new process"
            + (whether_committed(reading.progress) or MAY_BE_COMMITTED),
        )


def _where(reading: Reading) -> str:
    progress = reading.progress
    return f"while {progress.phase}, {progress.bytes_done} of {progress.bytes_total} bytes done"
