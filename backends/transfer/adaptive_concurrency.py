"""Limit the number of transfers that run at once, by what is measured of them.

Over a network, requests at once hide each other's waiting. Where the processor limits them they have nothing
to hide, and each costs more the more there are. So the limit climbs the hill that rate and cost make of it:

- While transfers keep a processor busy, half as many are tried, and kept if they move as many bytes a second
  at no more expense.
- While transfers wait, twice as many are tried, up to a ceiling, and kept if they move more bytes a second.

A trial that fails goes back to the limit before, and the next trial waits twice as long.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import urlsplit

from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.stores.http.rates import rates
from cloudckpt.backends.transfer.request_limit import at_first

_LEAST: Final = 2
"""One transfers while the other ends or begins a request."""
_BUSY: Final = 0.8
"""Processors that transfers use from which fewer are tried."""
_WAITING: Final = 0.4
"""Processors that transfers use below which there are more again."""
_AS_FAST: Final = 0.9
"""What fewer must move of the bytes a second that there were before."""
_AS_CHEAP: Final = 1.05
"""Share of the processor time of a byte before, which fewer transfers may cost."""
_FASTER: Final = 1.1
"""Share of the bytes a second before, which more transfers must move."""
_ROUNDS: Final = 2
"""Transfers a lane that make a measurement."""
_ENOUGH: Final = 16
"""Transfers that make a measurement of many lanes."""
_PATIENCE: Final = 1.0
"""Seconds that one waits for a lane: transfers that take longer wait for something else than a processor, and
nothing must stand still because others do."""
_REST: Final = 8
"""Measurements until fewer are tried again when that was slower; twice as many each time."""

Way = Literal["up", "down", "commit"]


class AdaptiveLimiter:
    """The lanes of all transfers of one process in one direction, to or from one place.

    A commit counts objects for bytes.

    Args:
        most: the ceiling.
        start: how many there are at first, instead of ``most``.
        clock: returns seconds.
        cpu: returns the seconds of processor time that the calling thread has used.
        busy: returns the processors that other threads are using for these transfers.
    """

    def __init__(
        self,
        most: int,
        start: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.thread_time,
        busy: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._most = most
        self._limit = most if start is None else min(most, start)
        self._clock, self._cpu, self._busy = clock, cpu, busy
        self._taken = 0
        self._changed = threading.Condition()
        self._before: tuple[int, float, float] | None = None
        """AdaptiveLimiter, bytes a second and processor time of a byte before fewer or more were tried."""
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
        limit = self._limit
        if self._ended >= min(_ROUNDS * limit, max(_ENOUGH, limit)) and self._elapsed:
            used = limit * self._used / self._elapsed + self._busy()
            self._adapt(limit * self._bytes / self._elapsed, used)
            self._changes += limit != self._limit
            self._changed.notify_all()
            self._begin()

    def _adapt(self, rate: float, used: float) -> None:
        """Change the limit by how many bytes a second were moved and how many processors that took."""
        self._rest = max(0, self._rest - 1)
        before, self._before = self._before, None
        if before is not None and self._was_in_vain(before, rate, used):
            self._limit = before[0]
            self._rest, self._next_rest = self._next_rest, 2 * self._next_rest
        elif used >= _BUSY and self._limit > _LEAST and not self._rest:
            self._before = (self._limit, rate, used / rate if rate else 0.0)
            self._limit = max(_LEAST, self._limit // 2)
        elif used < _WAITING and self._limit < self._most and not self._rest:
            self._before = (self._limit, rate, used / rate if rate else 0.0)
            self._limit = min(self._most, 2 * self._limit)

    def _was_in_vain(self, before: tuple[int, float, float], rate: float, used: float) -> bool:
        """Return True if a trial has not brought what it was for."""
        if self._limit > before[0]:
            return rate < _FASTER * before[1]
        return rate < _AS_FAST * before[1] or used > _AS_CHEAP * before[2] * rate


def lanes(uri: str, way: Way, most: int, start: int | None = None) -> AdaptiveLimiter:
    """Return the lanes to or from the bucket of a URI, which know what was found out before."""
    return _lanes(_Place.of(uri, way), most, start)


def transfer_lanes(store: ObjectStore, way: Literal["up", "down"], most: int) -> AdaptiveLimiter:
    """Return the lanes of a store's parts or ranges, which know what was found out before."""
    return _lanes(_Place.of(store.uri, way, is_remote=store.is_remote), most, None)


@dataclass(frozen=True, slots=True)
class _Place:
    """A process, a bucket and a direction, whose transfers have lanes of their own.

    A forked process has none of its parent's transfers.
    """

    process: int
    bucket: str
    way: Way
    is_remote: bool

    @classmethod
    def of(cls, uri: str, way: Way, *, is_remote: bool = False) -> _Place:
        parts = urlsplit(uri)
        return cls(os.getpid(), f"{parts.scheme}://{parts.netloc}", way, is_remote)


@functools.lru_cache(maxsize=16)
def _lanes(place: _Place, most: int, start: int | None) -> AdaptiveLimiter:
    if place.is_remote:
        return AdaptiveLimiter(most, at_first(most), busy=lambda: rates().busy)
    return AdaptiveLimiter(most, start)
