"""The arenas of an executor, handed out to one save at a time."""

from __future__ import annotations

import threading

from cloudckpt.executor.snapshot.arena import Arena
from cloudckpt.executor.snapshot.memory_layout import Layout
from cloudckpt.executor.snapshot.memory_limits import PROCESS_BYTES


class ArenaPool:
    """As many arenas as snapshots may be held at once. They keep their pages from save to save."""

    def __init__(self, snapshots: int) -> None:
        self.beside = PROCESS_BYTES
        """Bytes of memory that a snapshot leaves to a checkpoint process that is still to be started."""
        self._arenas = [self._new() for _ in range(snapshots)]
        self._free = list(range(snapshots))
        self._changed = threading.Condition()

    def __getitem__(self, index: int) -> Arena:
        return self._arenas[index]

    def __len__(self) -> int:
        return len(self._arenas)

    @property
    def busy(self) -> bool:
        """True if no arena is free."""
        with self._changed:
            return not self._free

    def missing(self, nbytes: int) -> int:
        """Return the bytes that snapshots of ``nbytes`` would take beyond the memory that is there."""
        return sum(max(0, arena.size_for(nbytes) - arena.nbytes) for arena in self._arenas)

    def acquire(self) -> int:
        """Return the index of an arena that was free, or once one is."""
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            # The one used last has pages that are touched already.
            return self._free.pop()

    def release(self, index: int) -> None:
        """Give an arena back."""
        with self._changed:
            self._free.append(index)
            self._changed.notify()

    def replace(self, index: int) -> None:
        """Leave an arena to a process that can't be ended, and give back a new one."""
        self._arenas[index] = self._new()
        self.release(index)

    def touch(self, layout: Layout) -> None:
        """Fault all arenas in, and lock what a device will copy to: a first time is slow."""
        taken = [self.acquire() for _ in range(len(self))]
        try:
            for index in taken:
                self._arenas[index].reserve(layout.nbytes)
                self._arenas[index].touch()
                if layout.devices:
                    self._arenas[index].pin()
        finally:
            for index in taken:
                self.release(index)

    def _new(self) -> Arena:
        return Arena(lambda: self.beside)

    def close(self) -> None:
        """Give the memory back."""
        for arena in self._arenas:
            arena.close()
