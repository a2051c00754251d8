"""A ceiling on the bytes that work in flight may hold."""

from __future__ import annotations

import threading


class MemoryBudget:
    """Admits work by the memory that it declares.

    Work that asks for more than the whole limit is admitted when nothing else is: the ceiling gives way
    before the save does, because a planner may hand out one value larger than the limit.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._changed = threading.Condition()

    def admit(self, nbytes: int) -> None:
        """Wait until ``nbytes`` fit, and hold them until :meth:`release`."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + nbytes <= self._limit)
            self._held += nbytes

    def release(self, nbytes: int) -> None:
        """Give back what ``admit`` held."""
        with self._changed:
            self._held -= nbytes
            self._changed.notify_all()
