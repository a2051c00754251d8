"""Progress of saves and loads: a bar each on a terminal, and else lines in the log."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from cloudckpt.backends.system import background_log
from cloudckpt.backends.system.printable import one_line

_TELL = 10.0
"""Seconds between two lines about one transfer, and before its first."""
_GIB = 1 << 30
_LINE = 512
"""Bytes that drawing a bar takes."""

_log = background_log.logger(__name__)


class Display(Protocol):
    """Shows transfers by their name. Called from any thread."""

    def show(self, name: str, phase: str, done: int, total: int) -> None:
        """Show how many bytes of how many are done."""

    def end(self, name: str) -> None:
        """Show no more of it."""


class Lines:
    """Lines in the log, for transfers that take long."""

    def __init__(self) -> None:
        self._told: dict[str, float] = {}

    def show(self, name: str, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told.setdefault(name, now) >= _TELL:
            self._told[name] = now
            _log.info("%s: %s, %.2f of %.2f GiB", one_line(name), phase, done / _GIB, total / _GIB)

    def end(self, name: str) -> None:
        self._told.pop(name, None)


class Bars:
    """tqdm's bars, which keep apart from other bars of the same program."""

    def __init__(self, tqdm: Any) -> None:
        self._tqdm = tqdm
        self._bars: dict[str, Any] = {}
        self._lock = threading.Lock()

    def show(self, name: str, phase: str, done: int, total: int) -> None:
        if not background_log.stderr_takes(_LINE):
            return  # a terminal that is stopped: the next look draws it, and no save waits
        with self._lock:
            bar = self._bars.get(name)
            if bar is None:
                bar = self._tqdm(
                    desc=one_line(name), unit="B", unit_scale=True, unit_divisor=1024, leave=False
                )
                self._bars[name] = bar
            bar.total = total
            bar.update(done - bar.n)  # draws it now and then
            if phase != bar.postfix:
                bar.set_postfix_str(phase)

    def end(self, name: str) -> None:
        with self._lock:
            if (bar := self._bars.pop(name, None)) is not None and background_log.stderr_takes(_LINE):
                bar.close()


def display() -> Display:
    """Bars where the standard error is a terminal and tqdm is installed, and else lines."""
    if sys.stderr is not None and sys.stderr.isatty():
        try:
            return Bars(importlib.import_module("tqdm").tqdm)
        except ModuleNotFoundError:
            _log.debug("there are lines about progress: bars take tqdm")
    return Lines()


class RankZeroDisplay:
    """The display of rank 0: a process may get its rank after its Checkpointer is made.

    Args:
        progress: False shows nothing on any rank.
        rank: returns the rank of this process.
    """

    def __init__(self, progress: bool, rank: Callable[[], int]) -> None:
        self._progress = progress
        self._rank = rank
        self._made: Display | None = None

    def __call__(self) -> Display | None:
        """Return the display, None on other ranks."""
        if not self._progress or self._rank() != 0:
            return None
        if self._made is None:
            self._made = display()
        return self._made


class Arriving:
    """A load that is shown while its bytes arrive, on the threads that read."""

    def __init__(self, shown: Display, name: str) -> None:
        self._shown, self._name = shown, name
        self._lock = threading.Lock()
        self._done = self._total = 0

    def begun(self, size: int) -> None:
        """So many bytes are about to be read."""
        with self._lock:
            self._total += size

    def arrived(self, name: str, size: int) -> None:  # noqa: ARG002 - an observer's
        """So many more have been."""
        with self._lock:
            self._done += size
            done, total = self._done, self._total
        self._shown.show(self._name, "loading", done, total)
