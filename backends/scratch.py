"""Memory for reads in flight: within a ceiling, and used again while it is warm.

The allocator would keep several freed buffers for each thread, far beyond any ceiling, and mapping fresh
memory for every read costs more than reading it.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator

from cloudckpt.backends.budget import Budget

_SMALL = 1 << 16
"""Bytes below which a buffer is not worth keeping."""


class Scratch:
    """Lends buffers of at most ``limit`` bytes together; more only to one that asks for more by itself."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._budget = Budget(limit)
        self._lock = threading.Lock()
        self._idle: list[mmap.mmap] = []
        self._lent = 0

    @contextlib.contextmanager
    def lent(self, nbytes: int) -> Iterator[memoryview]:
        """Lend a buffer, once it fits, for the block; nothing may look at it afterwards."""
        self._budget.admit(nbytes)
        try:
            if nbytes < _SMALL:
                yield memoryview(bytearray(nbytes))
                return
            buffer = self._take(nbytes)
            try:
                yield memoryview(buffer)[:nbytes]
            finally:
                self._give(buffer)
        finally:
            self._budget.release(nbytes)

    def clear(self) -> None:
        """Let idle memory go."""
        with self._lock:
            self._idle.clear()

    def _take(self, nbytes: int) -> mmap.mmap:
        with self._lock:
            fitting = [one for one in self._idle if nbytes <= len(one) <= nbytes + nbytes // 4]
            if fitting:
                buffer = min(fitting, key=len)
                self._idle.remove(buffer)
            else:
                while self._idle and self._lent + nbytes + sum(map(len, self._idle)) > self._limit:
                    self._idle.pop(0)
                buffer = mmap.mmap(-1, nbytes)
            self._lent += len(buffer)
            return buffer

    def _give(self, buffer: mmap.mmap) -> None:
        with self._lock:
            self._lent -= len(buffer)
            if len(buffer) <= self._limit:
                self._idle.append(buffer)
