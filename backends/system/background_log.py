"""Log messages that no save, load or close waits for.

A handler may block: standard error may be a pipe without a reader. A thread that a save's handle, another
rank or the end of a grace time depends on must not be in it. So every module of this project logs through
`logger`: records go into a bounded queue, and one thread hands them to the handlers that the program has set.
What does not fit is dropped and counted. Threads of the program wait a moment for their own records, so that
messages appear where they belong among its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

from cloudckpt.backends.system import descriptors
from cloudckpt.backends.system.system_limits import try_for

OWN: Final = "cloudckpt"
"""Names of this project's threads begin so: they wait for no record."""
_MOST: Final = 1000
"""Records that may wait."""
_A_MOMENT: Final = 0.5
"""Seconds that a thread of the program waits for its record to be written."""
_LOOK: Final = 0.05
"""Seconds between two looks at a stream that is full."""


def warning_on(rank: int, otherwise: int = logging.DEBUG) -> int:
    """Return the level of a warning that every rank has: WARNING on rank 0, ``otherwise`` on others."""
    return logging.WARNING if rank == 0 else otherwise


class _Writer:
    """A queue of records, and the thread that hands them to handlers."""

    def __init__(self) -> None:
        self._records: queue.Queue[tuple[logging.Logger | logging.Handler, logging.LogRecord]]
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)  # the child has no such thread

    def _reset(self) -> None:
        self._records = queue.Queue(_MOST)
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._dropped = 0
        self._stuck = False

    def put(self, to: logging.Logger | logging.Handler, record: logging.LogRecord) -> None:
        """Have a record handled, or drop it; return at once on threads of this project's own."""
        if threading.current_thread() is self._thread:  # from a handler, which is where it has to go
            to.handle(record)
            return
        if not self._runs():
            to.handle(record)
            return
        try:
            self._records.put_nowait((to, record))
        except queue.Full:
            self._dropped += 1
            return
        if not threading.current_thread().name.startswith(OWN) and not self._stuck:
            self.flush(_A_MOMENT)

    def flush(self, seconds: float) -> bool:
        """Wait until all records are handled; False where that took longer."""
        deadline = time.monotonic() + seconds
        waiting = self._records.all_tasks_done
        with waiting:
            while self._records.unfinished_tasks:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or self._stuck:
                    return False
                waiting.wait(min(remaining, _LOOK))
        return True

    def _runs(self) -> bool:
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._write, name=f"{OWN}-log", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no thread can be started: better a late message than none
                    return False
                self._thread = thread
            return True

    def _write(self) -> None:
        while True:
            to, record = self._records.get()
            try:
                self._handle(to, record)
                if self._dropped and self._records.empty():
                    dropped, self._dropped = self._dropped, 0
                    self._handle(to, _of_dropped(dropped))
            except Exception:  # noqa: BLE001, S110 - a handler's failure is not the business of a save
                pass
            finally:
                del to, record
                self._records.task_done()

    def _handle(self, to: logging.Logger | logging.Handler, record: logging.LogRecord) -> None:
        while not _has_room(to, record):
            self._stuck = True
            time.sleep(_LOOK)
        self._stuck = False
        to.handle(record)


def _of_dropped(count: int) -> logging.LogRecord:
    text = "%d messages were dropped: the log could not be written in time"
    return logging.LogRecord(OWN, logging.WARNING, __file__, 0, text, (count,), None)


def _has_room(to: logging.Logger | logging.Handler, record: logging.LogRecord) -> bool:
    """Return True if no handler would wait for a reader, as far as can be seen.

    A thread that waits inside a handler holds its lock, for which the interpreter's end would wait.
    """
    for handler in _handlers(to):
        if record.levelno < handler.level:
            continue
        stream: Any = getattr(handler, "stream", None)
        with contextlib.suppress(Exception):  # a stream of the program's own may raise anything
            if not descriptors.takes(stream.fileno(), len(handler.format(record)) + 1):
                return False
    return True


def _handlers(to: logging.Logger | logging.Handler) -> Iterator[logging.Handler]:
    if isinstance(to, logging.Handler):
        yield to
        return
    found, logger = False, to
    while True:
        for handler in logger.handlers:
            found = True
            yield handler.target if isinstance(handler, BackgroundHandler) else handler
        if not logger.propagate or logger.parent is None:
            break
        logger = logger.parent
    if not found and logging.lastResort is not None:
        yield logging.lastResort


_writer = _Writer()


class _BackgroundLogger(logging.Logger):
    """A logger of the program's by the same name, whose handlers are called on a thread of their own."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._real = logging.getLogger(name)

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - logging's name
        return self._real.isEnabledFor(level)

    def getEffectiveLevel(self) -> int:  # noqa: N802 - logging's name
        return self._real.getEffectiveLevel()

    def handle(self, record: logging.LogRecord) -> None:
        _writer.put(self._real, record)


class BackgroundHandler(logging.Handler):
    """A handler in front of another, which is called on the thread of this module.

    Args:
        target: the other.
    """

    def __init__(self, target: logging.Handler) -> None:
        super().__init__()
        self.target = target

    def createLock(self) -> None:  # noqa: N802 - logging's name
        """Have no lock: the queue has its own, and nothing else is shared."""
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        """Emit a record that passes the filters. Since Python 3.13 the inherited method needs a lock."""
        passed = self.filter(record)  # since Python 3.12 a filter may return another record
        if passed:
            self.emit(passed if isinstance(passed, logging.LogRecord) else record)
        return bool(passed)

    def emit(self, record: logging.LogRecord) -> None:
        if record.args or record.exc_info:  # as they are now: a thread looks at them later
            record.msg, record.args = record.getMessage(), None
        _writer.put(self.target, record)

    def flush(self) -> None:
        """Do nothing: to wait for records, call `flush` of this module."""


def logger(name: str) -> logging.Logger:
    """Return the logger that a module with this name logs to."""
    return _BackgroundLogger(name)


def write(handler: logging.Handler, record: logging.LogRecord) -> None:
    """Have a handler handle a record, on the thread of this module."""
    _writer.put(handler, record)


def flush(seconds: float = 1.0) -> bool:
    """Wait until what was logged is written, for at most so many seconds; False where it is not."""
    return _writer.flush(seconds)


def shut_down(seconds: float = 1.0) -> None:
    """Write what was logged and flush all handlers, for at most so many seconds, before `os._exit`."""
    if not flush(seconds):
        return
    try_for(seconds, logging.shutdown, f"{OWN}-log-end")


def stderr_takes(nbytes: int) -> bool:
    """Return True unless writing so many bytes to standard error would wait for a reader."""
    try:
        return descriptors.takes(sys.stderr.fileno(), nbytes)
    except Exception:  # noqa: BLE001 - None, closed, or an object of the program's own
        return True
