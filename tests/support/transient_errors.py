"""Transient errors for a proxy: rules by which a share of all requests fails, or a server is soon busy."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping

from support.proxy import (
    Answer,
    CutRequest,
    Delay,
    HalveAnswer,
    LoseAnswer,
    Proxy,
    Request,
    Spoiling,
    Stall,
)

_KINDS: Mapping[str, Callable[[random.Random], Spoiling]] = {
    "503 SlowDown": lambda _: Answer(503, "SlowDown"),
    "500 InternalError": lambda _: Answer(500, "InternalError"),
    "429 and Retry-After": lambda _: Answer(429, "TooManyRequests", {"Retry-After": "0"}),
    "reset before it acted": lambda dice: CutRequest(dice.choice((0, 1000, 1 << 20))),
    "reset after it acted": lambda _: LoseAnswer(),
    "answer cut in half": lambda _: HalveAnswer(),
    "black hole": lambda _: Stall(),
    "late answer": lambda dice: Delay(dice.uniform(0.0, 0.5)),
}
KINDS = tuple(_KINDS)


class TransientErrors:
    """A rule that spoils each request with the probability ``share``, in one of eight equally likely ways.

    The dice are seeded; which request gets which throw is up to the threads that make them.
    """

    def __init__(self, seed: int, share: float) -> None:
        self._dice = random.Random(seed)
        self._share = share
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._injected: Counter[tuple[str, str]] = Counter()

    def __call__(self, request: Request) -> Spoiling:
        with self._lock:
            self._requests[request.operation] += 1
            if self._dice.random() >= self._share:
                return None
            kind = self._dice.choice(KINDS)
            self._injected[kind, request.operation] += 1
            return _KINDS[kind](self._dice)

    @property
    def requests(self) -> Counter[str]:
        """Requests that arrived, by operation."""
        with self._lock:
            return self._requests.copy()

    @property
    def injected(self) -> Counter[tuple[str, str]]:
        """Faults injected, by kind and operation."""
        with self._lock:
            return self._injected.copy()

    def table(self) -> str:
        """Return all counts as text, an operation a line."""
        requests, injected = self.requests, self.injected
        width = max(map(len, requests), default=0)
        lines = [f"{'':{width}}  requests  spoilt  " + "  ".join(KINDS)]
        for operation in sorted(requests):
            counts = [injected[kind, operation] for kind in KINDS]
            cells = "  ".join(f"{count:>{len(kind)}}" for count, kind in zip(counts, KINDS, strict=True))
            lines.append(f"{operation:{width}}  {requests[operation]:>8}  {sum(counts):>6}  {cells}")
        totals = [sum(injected[kind, operation] for operation in requests) for kind in KINDS]
        cells = "  ".join(f"{count:>{len(kind)}}" for count, kind in zip(totals, KINDS, strict=True))
        lines.append(f"{'all':{width}}  {requests.total():>8}  {injected.total():>6}  {cells}")
        return "\n".join(lines)


class Busy:
    """A rule by which a server that has more than ``most`` requests in flight answers SlowDown."""

    def __init__(self, proxy: Proxy, most: int, seconds: float) -> None:
        self._proxy = proxy
        self._most = most
        self._seconds = seconds
        self._lock = threading.Lock()
        self._seen: list[int] = []

    def __call__(self, _request: Request) -> Spoiling:
        in_flight = self._proxy.in_flight
        with self._lock:
            self._seen.append(in_flight)
        return Answer(503, "SlowDown") if in_flight > self._most else Delay(self._seconds)

    @property
    def seen(self) -> list[int]:
        """For each request in the order of their arrival, how many were in flight with it."""
        with self._lock:
            return list(self._seen)
