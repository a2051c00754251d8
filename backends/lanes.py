"""How many transfers run side by side: as many as are allowed, or fewer where that is no slower.

Over a network, requests side by side hide each other's waiting. Where the processor is what limits them they
have nothing to hide: they take turns at the interpreter's lock, and every turn costs. So while transfers keep
a processor busy, half as many are tried, and kept to if as many bytes a second are moved at no more expense;
and when they no longer do, twice as many.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, Literal
from urllib.parse import urlsplit

_LEAST: Final = 2
"""One transfers while the other ends or begins a request."""
_BUSY: Final = 0.8
"""Processors that transfers use from which fewer are tried."""
_WAITING: Final = 0.4
"""Processors that transfers use below which there are more again."""
_AS_FAST: Final = 0.9
"""What fewer must move of the bytes a second that there were before."""
_ROUNDS: Final = 2
"""Transfers a lane that make a measurement."""
_PATIENCE: Final = 1.0
"""Seconds that one waits for a lane: transfers that take longer wait for something else than a processor, and
nothing must stand still because others do."""
_REST: Final = 8
"""Measurements until fewer are tried again when that was slower; twice as many each time."""

Way = Literal["up", "down", "commit"]


class Lanes:
    """The lanes of all transfers of one process in one direction, to or from one place.

    A commit counts objects for bytes. ``start`` is how many there are at first, instead of ``most``.
    """

    def __init__(
        self,
        most: int,
        start: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.thread_time,
    ) -> None:
        self._most = most
        self._limit = most if start is None else min(most, start)
        self._clock, self._cpu = clock, cpu
        self._taken = 0
        self._changed = threading.Condition()
        self._before: tuple[int, float, float] | None = None
        """Lanes, bytes a second and processor time of a byte before fewer were tried."""
        self._rest = 0
        self._next_rest = _REST
        self._changes = 0
        self._begin()

    @property
    def limit(self) -> int:
        """Transfers that may run now."""
        with self._changed:
            return self._limit

    @contextlib.contextmanager
    def taken(self, nbytes: int) -> Iterator[None]:
        """Hold a lane during the block, which transfers so many bytes unless it raises.

        Waits for a free one, but not for long: it is a matter of cost alone.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._taken < self._limit, timeout=_PATIENCE)
            self._taken += 1
            change = self._changes
        began, cpu, whole = self._clock(), self._cpu(), False
        try:
            yield
            whole = True
        finally:
            elapsed, used = self._clock() - began, self._cpu() - cpu
            with self._changed:
                full = self._taken >= max(_LEAST, self._limit - 1)  # another may just have ended
                self._taken -= 1
                if whole and full and change == self._changes:
                    self._count(nbytes, elapsed, used)
                self._changed.notify()

    def _begin(self) -> None:
        self._ended = 0
        self._bytes = 0
        self._elapsed = self._used = 0.0

    def _count(self, nbytes: int, elapsed: float, used: float) -> None:
        """Take in a transfer that began since the last change and had others in all other lanes."""
        self._ended += 1
        self._bytes += nbytes
        self._elapsed += elapsed
        self._used += used
        if self._ended >= _ROUNDS * self._limit and self._elapsed:
            limit = self._limit
            self._adapt(limit * self._bytes / self._elapsed, limit * self._used / self._elapsed)
            self._changes += limit != self._limit
            self._changed.notify_all()
            self._begin()

    def _adapt(self, rate: float, used: float) -> None:
        """Change the limit by how many bytes a second were moved and how many processors that took."""
        self._rest = max(0, self._rest - 1)
        before, self._before = self._before, None
        if before is not None and (rate < _AS_FAST * before[1] or used > before[2] * rate):
            self._limit = before[0]
            self._rest, self._next_rest = self._next_rest, 2 * self._next_rest
        elif used >= _BUSY and self._limit > _LEAST and not self._rest:
            self._before = (self._limit, rate, used / rate if rate else 0.0)
            self._limit = max(_LEAST, self._limit // 2)
        elif used < _WAITING and self._limit < self._most:
            self._limit = min(self._most, 2 * self._limit)


def lanes(uri: str, way: Way, most: int, start: int | None = None) -> Lanes:
    """Return the lanes to or from the bucket of a URI, which know what was found out before."""
    parts = urlsplit(uri)
    return _lanes(os.getpid(), f"{parts.scheme}://{parts.netloc}", way, most, start)


@functools.lru_cache(maxsize=16)
def _lanes(process: int, place: str, way: Way, most: int, start: int | None) -> Lanes:
    del process, place, way  # a process that was forked has none of its parent's transfers
    return Lanes(most, start)
