"""Preemption: a job that gets a signal to end saves a last step on every rank, or gives that up in time."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from cloudckpt.backends.errors import ConfigurationError, ExecutorError
from cloudckpt.backends.system import background_log, system_limits
from cloudckpt.events import CheckpointInfo
from cloudckpt.executor.coordination.final_step import FinalStep, Notify
from cloudckpt.signals import Listener

_RESERVE = 5.0
"""Seconds of the grace time that are kept for giving up, or a fifth of it where that is less."""

_LAST_WORDS = 1.0
"""Seconds for messages to be written when the grace time is over."""

_log = background_log.logger(__name__)


class Preempted(SystemExit):
    """The job is preempted, and this process ends: with status 128 plus the signal's number.

    Attributes:
        signal: ``"SIGTERM"`` or ``"SIGUSR1"``.
        step: the last one; None where the loop did not come to one in time.
        info: of its checkpoint, once committed; None where it was given up, and what was committed before
            is the newest.
    """

    def __init__(self, signal: str, step: int | None = None, info: CheckpointInfo | None = None) -> None:
        super().__init__(_status(signal))
        self.signal, self.step, self.info = signal, step, info

    def __reduce__(self) -> Any:
        return type(self), (self.signal, self.step, self.info)


class Preemption:
    """The part of a Checkpointer that handles preemption.

    Signals are handled from the first call that saves or is about to: a Checkpointer that only reads leaves
    them alone.

    Args:
        grace: seconds from the notice until the process has ended; None leaves signals alone.
        rank: returns the rank of this process.

    Raises:
        ConfigurationError: the grace time can't be used.
    """

    def __init__(self, grace: float | None, rank: Callable[[], int]) -> None:
        if grace is not None and not 0 < grace < math.inf:
            raise ConfigurationError(
                f"preemption_grace is {grace!r}", hint="Give a number of seconds above 0, or None"
            )
        self._grace = grace
        self._rank = rank
        self._signal: str | None = None
        """Of the first notice, of any rank."""
        self._own: str | None = None
        """The notice that this rank got."""
        self._deadline: float | None = None
        self._acted = threading.Event()
        self._acting = self._preempted = self._closed = False
        self._lock = threading.Lock()
        self._final_step: FinalStep | None = None
        self._listener = Listener(self.tell)

    def start(self) -> None:
        """Handle signals from now on, as far as they have the system's own handlers.

        Only the main thread can do so: a call on another one leaves it to a later call.
        """
        if self._grace is not None and not self._closed:
            self._listener.start()

    @property
    def remaining(self) -> float | None:
        """Seconds left for saving, none below 0; None before the job is preempted."""
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - self._reserve - time.monotonic())

    def tell(self, name: str) -> None:
        """Have every rank save its next step as the last. From any thread; returns at once.

        Raises:
            ConfigurationError: there is no grace time.
        """
        if self._grace is None:
            raise ConfigurationError(
                "this Checkpointer has preemption_grace=None",
                hint="Give it a number of seconds",
            )
        if threading.current_thread() is threading.main_thread():
            self.start()
        self._own = name  # before the look, and `passes` looks in the other order: one of them gives notice
        if self._final_step is None:
            self._hear(f"{name} {self._rank()}")
        else:
            self._final_step.give_notice(f"{name} {self._rank()}")

    def passes(self, meet: Callable[[Notify], FinalStep]) -> bool:
        """Return True for an ordinary call of the trainer's, and False where it is the last.

        ``meet`` has the ranks meet, at the first call.
        """
        if self._grace is None:
            return True
        self.start()
        if self._final_step is None:
            self._final_step = meet(self._hear)
            if self._own is not None:
                self._final_step.give_notice(f"{self._own} {self._rank()}")
        remaining = self.remaining
        return self._final_step.passes(self._grace if remaining is None else remaining)

    def act(self) -> None:
        """Say that the main thread does what is to be done, and looks at the time that remains itself."""
        self._acting = True

    def ended(self, step: int, info: CheckpointInfo | None) -> Preempted:
        """Return the exception to raise once the last save has ended or was given up."""
        self._preempted = True
        if info is not None:  # giving up has to end in time as well
            self._acted.set()
        return Preempted(self._signal or "SIGTERM", step, info)

    def close(self, *, deliver: bool) -> None:
        """Give the signals back.

        With ``deliver``, one that came and had no save now does what it does without a Checkpointer.
        """
        self._closed = True
        self._acted.set()
        if self._final_step is not None:
            self._final_step.close()
        listening = self._listener.listening
        self._listener.stop()
        if deliver and listening and self._own is not None and not self._preempted:
            signal.raise_signal(signal.Signals[self._own])

    @property
    def _reserve(self) -> float:
        return min(_RESERVE, (self._grace or 0.0) / 5)

    def _hear(self, notice: str) -> None:
        name, _, rank = notice.partition(" ")
        with self._lock:
            if self._signal is not None:
                return
            self._signal = name
        level = background_log.warning_on(self._rank(), otherwise=logging.INFO)
        _log.log(level, "%s on rank %s: the next step is the last, and is saved", name, rank)
        if self._grace is not None:
            self._deadline = time.monotonic() + self._grace
            hurry = threading.Thread(
                target=self._hurry, args=(name, self._grace), name="cloudckpt-grace", daemon=True
            )
            try:
                system_limits.start(hurry)
            except ExecutorError as error:
                _log.warning("the end of the grace time is not enforced: %s", error)

    def _hurry(self, name: str, grace: float) -> None:
        """Make the process end in time, also where its main thread is blocked."""
        reserve = self._reserve
        if self._acted.wait(grace - reserve):
            return
        if self._acting:  # it looks at the time itself
            if self._acted.wait(reserve):
                return
        else:
            _log.warning("%s: no last step was reached in time, what was committed stays", name)
            self._preempted = True
            self._listener.interrupt(name, Preempted(name))
            time.sleep(reserve)
        _log.error("%s: the grace time is over, and this process ends as it is", name)
        background_log.shut_down(min(_LAST_WORDS, reserve))
        os._exit(_status(name))


def _status(name: str) -> int:
    return 128 + signal.Signals[name]
