"""Measured rates of the bodies that a process moves: what is usual, and which connection is far below it."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import statistics
import termios
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, Literal, Protocol

Direction = Literal["up", "down"]

NEAR: Final = 0.004
"""Seconds in which a server in the same room answers. S3 takes 10 to 30 milliseconds from next door.

Nearby, connections differ because processors are short, and a new one is no faster.
"""
LEAST: Final = 64 << 10
"""Bytes a second that all bodies of a loop must move together, each of them its share, in each period of a
timeout. A peer that takes or sends a byte now and then passes every wait for bytes."""
_KEPT: Final = 8
"""Ended bodies whose last rates are remembered. The fewer are left, the faster each one is: the last
count."""
_ANSWERS: Final = 32
"""Answers whose delay is remembered."""
_RECENT: Final = 10.0
"""Seconds for which a rate is worth a comparison."""
_LEAST_AGE: Final = 0.5
"""Seconds that a body is watched before its rate is compared: a new connection begins slowly."""
_LEAST_SIZE: Final = 1 << 20
"""Bytes of a body that is worth a second request."""
_LEAST_COMPARED: Final = 3
"""Rates without which nothing is known to be usual."""
_SLOWER: Final = 3.0
"""Factor by which a slow connection is slower than usual."""
_WORTH: Final = 2.0
"""Factor by which the rest of a body must take longer than a new request."""
_NEW_REQUEST: Final = 0.1
"""Seconds that a new request takes beside its body, by estimate."""
_CUTS: Final = 3.0
"""Slow connections that may be cut at once."""
_CUTS_A_BODY: Final = 0.125
"""Cuts that each body that ends allows: a request in eight is repeated at most."""
_BOUND: Final = 0.85
"""Processors of a loop in use from which a slow connection says nothing: the loop itself may be late."""
_FEW: Final = 4
"""Factor by which there were more bodies a moment ago, where those left have the network to themselves."""
_DECAY: Final = 0.99
"""Share of a peak that remains after a measurement."""
_SMOOTHING: Final = 0.15
"""Weight of the newest measurement, in averages over a third of a second."""


class SlowConnectionError(ConnectionError):
    """A connection was cut because a new request is expected to end sooner."""


class Moving(Protocol):
    """A body that is being moved."""

    direction: Direction
    nbytes: int
    moved: int
    began: float
    seen: int
    """Bytes that had been moved at the last measurement."""
    rate: float
    """Bytes a second of late."""

    @property
    def unsent(self) -> int:
        """Bytes of ``moved`` that the kernel has not sent yet."""
        ...


class Rates:
    """The rates of one process. Loops report to it; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended: dict[Direction, deque[tuple[float, float]]] = {
            "up": deque(maxlen=_KEPT),
            "down": deque(maxlen=_KEPT),
        }
        """When a body ended, and its bytes a second."""
        self._usual: dict[Direction, float | None] = {"up": None, "down": None}
        self._peaks = {"up": _Peaks(), "down": _Peaks()}
        self._cuts = _CUTS
        self._busy = 0.0
        self._answers: deque[float] = deque(maxlen=_ANSWERS)
        """Seconds from the end of a request to the head of its answer."""

    @property
    def busy(self) -> float:
        """Processors that the loops keep busy, as of the last moments in which they had bodies to move."""
        return self._busy

    @property
    def latency(self) -> float | None:
        """The fewest seconds that one of the last answers took to begin; None before the first.

        That is the distance. The others also waited for a processor, here or there.
        """
        with self._lock:
            return min(self._answers, default=None)

    def answered(self, seconds: float) -> None:
        """Take in how long an answer took to begin."""
        with self._lock:
            self._answers.append(seconds)

    def tick(self, bodies: Iterable[Moving], elapsed: float, cpu: float) -> None:
        """Take in what a loop has done since it last called.

        Args:
            bodies: those that it is moving.
            elapsed: seconds since.
            cpu: seconds of processor that its thread used.
        """
        now = time.monotonic()
        live: dict[Direction, list[float]] = {"up": [], "down": []}
        count = 0
        for body in bodies:
            count += 1
            moved = body.moved - body.unsent
            latest = (moved - body.seen) / max(min(elapsed, now - body.began), 1e-3)
            body.rate += (_SMOOTHING if body.seen else 1.0) * (latest - body.rate)
            body.seen = moved
            if now - body.began >= _LEAST_AGE and body.nbytes >= _LEAST_SIZE:
                live[body.direction].append(body.rate)
        with self._lock:
            if count:
                self._busy += _SMOOTHING * (cpu / elapsed - self._busy)
            for direction, ended in self._ended.items():
                alone = self._peaks[direction].alone(live[direction])
                rates = live[direction] + [rate for when, rate in ended if now - when < _RECENT]
                # The lower quartile: where rates differ widely by themselves, none of them stands out.
                enough = len(rates) >= _LEAST_COMPARED
                quartile = statistics.quantiles(rates, n=4)[0] if enough else None
                self._usual[direction] = max(quartile, alone) if quartile is not None else None

    def ended(self, body: Moving) -> None:
        """Take in a body that has been moved whole."""
        now = time.monotonic()
        rate = body.rate or body.nbytes / max(now - body.began, 1e-3)
        with self._lock:
            self._cuts = min(_CUTS, self._cuts + _CUTS_A_BODY)
            if body.nbytes >= _LEAST_SIZE:
                self._ended[body.direction].append((now, rate))

    def is_slow(self, body: Moving) -> bool:
        """Return True for a body that a new request would move sooner. It counts as cut then."""
        age = time.monotonic() - body.began
        usual = self._usual[body.direction]
        if usual is None or age < _LEAST_AGE or body.nbytes < _LEAST_SIZE or self._busy > _BOUND:
            return False
        if (self.latency or 0.0) < NEAR:
            return False
        moved = body.moved - body.unsent
        rate = max(body.rate, moved / age, 1.0)  # neither a slow start nor a pause makes a slow connection
        if rate * _SLOWER > usual:
            return False
        if (body.nbytes - moved) / rate < _WORTH * (body.nbytes / usual + _NEW_REQUEST):
            return False
        with self._lock:
            if self._cuts < 1:
                return False
            self._cuts -= 1
        return True


class _Peaks:
    """The highest values of late: of one body's rate, of all rates together, and of the number of bodies."""

    def __init__(self) -> None:
        self._one = self._all = self._count = 0.0

    def alone(self, rates: Sequence[float]) -> float:
        """Return the bytes a second that a new body would have, where few are left; 0 where many share it.

        Args:
            rates: of the bodies that are being moved.
        """
        if not rates:
            return 0.0
        self._one = max(self._one * _DECAY, *rates)
        self._all = max(self._all * _DECAY, sum(rates))
        self._count = max(self._count * _DECAY, len(rates))
        few = len(rates) * _FEW <= self._count
        return min(self._one, self._all / len(rates)) if few else 0.0


def unsent_bytes(descriptor: int) -> int:
    """Return how many bytes of a socket the kernel has not sent, or that the peer has not acknowledged."""
    count = array.array("i", [0])
    with contextlib.suppress(OSError):  # not every system answers for a socket
        fcntl.ioctl(descriptor, termios.TIOCOUTQ, count)
    return count[0]


_rates: dict[int, Rates] = {}
_lock = threading.Lock()


def rates() -> Rates:
    """Return the rates of this process; a forked child begins anew."""
    process = os.getpid()
    found = _rates.get(process)
    if found is None:
        with _lock:
            _rates.clear()
            found = _rates.setdefault(process, Rates())
    return found
