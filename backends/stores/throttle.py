"""Slowing down together: how many requests of one store may be in flight.

The rule is TCP's (additive increase, multiplicative decrease). When the store says that it is too much, the
limit is halved, for all threads at once and once an event: requests that were in flight already when it was
halved tell nothing new. Successes let more in again, slowly: a client that grows by one each round, as TCP
does, finds out at every few requests that a small limit holds, and each time costs an attempt.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

ON_BEHALF: Final = 64
"""Requests without a body that a process may have in flight where it acts for many ranks, each of which could
have its own: a store takes a tenth of a second or more to complete an upload, and most of that is waiting."""
_FEW: Final = 8
"""Requests in flight that tell nothing of a limit above them."""
_ROUNDS: Final = 8
"""Times that as many requests as are allowed must succeed before one more is."""


class Throttle:
    """The limit of one store in one process, shared by its threads; at least one request is let through.

    A request that is let in must not wait for another of the same store.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._in_flight = 0
        self._peak = 0
        """Requests that were in flight at once, since the limit was halved."""
        self._events = 0
        self._changed = threading.Condition()

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        with self._changed:
            return int(self._limit)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[int]:
        """Wait for room and hold it during the block; yields how many times the limit was halved before."""
        with self._changed:
            self._changed.wait_for(lambda: self._in_flight < int(self._limit))
            self._in_flight += 1
            self._peak = max(self._peak, self._in_flight)
            events = self._events
        try:
            yield events
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify()

    def throttled(self, events: int) -> None:
        """Halve the limit, unless it was halved since the request was let in after so many ``events``.

        Where it was far above what was in flight, that is what is halved: it was too much already.
        """
        with self._changed:
            if events == self._events:
                self._events += 1
                self._limit = max(1.0, min(self._limit, max(self._peak, _FEW)) / 2)
                self._peak = self._in_flight

    def succeeded(self) -> None:
        """Let a little more in, up to where it began."""
        with self._changed:
            self._limit = min(float(self._most), self._limit + 1 / (_ROUNDS * self._limit))
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Throttles:
    """The limits of one store in one process, by the kind of request."""

    transfers: Throttle
    on_behalf: Throttle
    """Of requests that one process makes for many ranks."""

    @classmethod
    def of(cls, concurrency: int) -> Throttles:
        """Return the throttles of a rank that may have so many requests in flight."""
        return cls(Throttle(concurrency), Throttle(max(concurrency, ON_BEHALF)))
