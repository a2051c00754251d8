"""Memory for transfers in flight: within a ceiling, and used again while it is warm.

The allocator would keep several freed buffers for each thread, far beyond any ceiling, and mapping fresh
memory for every transfer costs more than the transfer.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Iterator

from cloudckpt.backends.transfer.cuda import lock_pages, unlock_pages
from cloudckpt.backends.transfer.memory_budget import MemoryBudget

_SMALL = 1 << 16
"""Bytes below which a buffer is not worth keeping."""
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)
"""Large pages are touched, and locked for a device, in half the time; shared memory would have none."""


class BufferPool:
    """Lends buffers of at most ``limit`` bytes together; more only to one that asks for more by itself."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._budget = MemoryBudget(limit)
        self._lock = threading.Lock()
        self._idle: list[_Buffer] = []
        self._held = 0
        """Bytes of what is lent, and of what its borrowers hold beside it."""

    @contextlib.contextmanager
    def lent(self, nbytes: int, *, locked: bool = False, beside: int = 0) -> Iterator[memoryview]:
        """Lend a buffer, once it fits, for the block; nothing may look at it afterwards.

        Args:
            nbytes: its size.
            locked: whether a CUDA device will copy from it or to it.
            beside: bytes that the borrower holds elsewhere; idle buffers make room for them.
        """
        self._budget.admit(nbytes)
        try:
            if nbytes < _SMALL and not beside:
                yield memoryview(bytearray(nbytes))
                return
            buffer = self._take(nbytes, beside)
            try:
                if locked:
                    buffer.lock()
                yield buffer.view(nbytes)
            finally:
                self._give(buffer, beside)
        finally:
            self._budget.release(nbytes)

    def clear(self) -> None:
        """Let idle memory go."""
        with self._lock:
            idle, self._idle = self._idle, []
        del idle  # outside of the lock

    def _take(self, nbytes: int, beside: int) -> _Buffer:
        superfluous: list[_Buffer] = []
        with self._lock:
            fitting = [one for one in self._idle if nbytes <= one.size <= nbytes + nbytes // 4]
            buffer = min(fitting, key=lambda one: one.size) if fitting else _Buffer(nbytes)
            if fitting:
                self._idle.remove(buffer)
            self._held += buffer.size + beside
            while self._idle and self._held + sum(one.size for one in self._idle) > self._limit:
                superfluous.append(self._idle.pop(0))
        del superfluous  # outside of the lock
        return buffer

    def _give(self, buffer: _Buffer, beside: int) -> None:
        with self._lock:
            self._held -= buffer.size + beside
            if _SMALL <= buffer.size <= self._limit:
                self._idle.append(buffer)


class _Buffer:
    """Pages of memory; mapped when they are first asked for, and given back when they are not in use."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._map: mmap.mmap | None = None
        self._locked: int | None = None

    def view(self, nbytes: int) -> memoryview:
        """Its first bytes."""
        return memoryview(self._mapped())[:nbytes]

    def lock(self) -> None:
        """Have the pages locked, where they can be; once is enough."""
        if self._locked is None and self.size:
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapped()))
            if lock_pages(address, self.size):
                self._locked = address

    def __del__(self) -> None:
        if self._locked is not None:  # before the pages go
            unlock_pages(self._locked)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            self._map = mmap.mmap(-1, max(1, self.size), **_PRIVATE)
            if _HUGE_PAGES is not None:
                with contextlib.suppress(OSError):  # a kernel without them
                    self._map.madvise(_HUGE_PAGES)
        return self._map
