"""Signals that end a process, noticed while its main thread is busy, and handled when it can.

Python runs a handler between two of the main thread's bytecodes, which a collective may keep it from for as
long as it lasts. The interpreter writes the signal's number to a pipe at once.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Final

from cloudckpt.backends.errors import ExecutorError
from cloudckpt.backends.system import background_log, descriptors, system_limits

SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers say it with: torchrun, Kubernetes and spot machines the first, Slurm the second as well."""

_STOP = b"\0"

_log = background_log.logger(__name__)


class Listener:
    """A receiver of the names of signals.

    Args:
        notify: called with the signal's name, on a thread of this module's.
    """

    def __init__(self, notify: Callable[[str], object]) -> None:
        self.notify = notify
        self.overdue: BaseException | None = None
        """What the main thread is to raise where it is, at the next signal."""
        self.listening = False
        self._refused = False

    def start(self) -> None:
        """Listen from now on, where these signals would end the process: no handler is replaced.

        Off the main thread a later call tries again.
        """
        if self.listening or self._refused:
            return
        if threading.current_thread() is not threading.main_thread():
            _say_left_alone()
            return
        self.listening = _ears.add(self)
        self._refused = not self.listening

    def interrupt(self, name: str, error: BaseException) -> None:
        """Have the main thread raise an error wherever it is, as Ctrl-C does."""
        self.overdue = error
        main = threading.main_thread().ident
        if self.listening and main is not None:
            signal.pthread_kill(main, signal.Signals[name])

    def stop(self) -> None:
        """Listen no longer; the last one gives the signals back to the system."""
        if self.listening:
            self.listening = False
            _ears.remove(self)


class _Handlers:
    """The handlers of this process, while anybody listens."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._forks = False
        self._mask: set[int] = set()
        self._taken: list[signal.Signals] = []
        self._read = self._write = -1
        self._thread: threading.Thread | None = None

    def add(self, listener: Listener) -> bool:
        if not self._listeners and not self._open():
            return False
        self._listeners.append(listener)
        return True

    def remove(self, listener: Listener) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)
        if self._listeners or not self._taken:
            return
        if threading.current_thread() is not threading.main_thread():
            return  # the handlers stay, and what they hear goes nowhere: the process is at its end
        self._close()

    def _open(self) -> bool:
        free = [one for one in SIGNALS if signal.getsignal(one) is signal.SIG_DFL]
        if left := [one.name for one in SIGNALS if one not in free]:
            _log.info("%s are left to the handlers that they have", " and ".join(left))
        if not free:
            return False
        if not self._forks:
            os.register_at_fork(before=self._hold, after_in_parent=self._let, after_in_child=self._leave)
            self._forks = True
        with system_limits.explained("listen to SIGTERM and SIGUSR1"):
            self._read, self._write = descriptors.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._listen, name="cloudckpt-signals", daemon=True)
        try:
            system_limits.start(self._thread)
        except ExecutorError:
            os.close(self._read)
            os.close(self._write)
            raise
        for one in free:
            signal.signal(one, self._handle)
        self._taken = free
        former = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if former != -1:  # an event loop's: the handler alone tells us then
            signal.set_wakeup_fd(former)
        return True

    def _hold(self) -> None:
        """Before a fork: a signal that the child gets at once would come to us through the pipe."""
        if self._taken:
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._taken)

    def _let(self) -> None:
        if self._taken:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _leave(self) -> None:
        """Restore the signals of a forked child, such as a DataLoader's worker."""
        if self._taken:
            self._listeners.clear()
            self._give_back()
            os.close(self._read)
            os.close(self._write)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _give_back(self) -> None:
        if (former := signal.set_wakeup_fd(-1)) != self._write:
            signal.set_wakeup_fd(former)
        for one in self._taken:
            if signal.getsignal(one) == self._handle:
                signal.signal(one, signal.SIG_DFL)
        self._taken = []

    def _close(self) -> None:
        self._give_back()
        os.write(self._write, _STOP)
        if self._thread is not None:
            self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - Python's interface
        os.write(self._write, bytes([number]))
        for listener in self._listeners:
            if (error := listener.overdue) is not None:
                listener.overdue = None
                raise error

    def _listen(self) -> None:
        while (number := os.read(self._read, 1)) != _STOP:
            if number[0] in self._taken:
                for listener in list(self._listeners):
                    listener.notify(signal.Signals(number[0]).name)


@functools.cache
def _say_left_alone() -> None:
    """Log it, once for a process."""
    _log.info("SIGTERM and SIGUSR1 are left alone until the main thread saves: only it can handle signals")


_ears = _Handlers()
"""Handlers are the process's, whoever listens."""
