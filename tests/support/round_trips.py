"""Round trips that a client waits for one after another, as a proxy in front of a server sees them.

Requests that are in flight together are one round trip. The number that counts is the longest chain of
requests of which each begins after the answer to the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from support.proxy import Delay, Exchange, Proxy, Request

SECONDS = (0.05, 0.4)
"""Round trips: long beside what a client computes between two requests, on a machine that is idle or busy."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Requests of which each begins after the answer to the one before it."""

    exchanges: tuple[Exchange, ...] = ()

    def __len__(self) -> int:
        return len(self.exchanges)

    def __str__(self) -> str:
        first = self.exchanges[0].began if self.exchanges else 0.0
        return "\n".join(
            f"{number}. {one.began - first:.3f}-{one.ended - first:.3f} s {spelled(one.request)}"
            for number, one in enumerate(self.exchanges, 1)
        )


def chain_of(exchanges: Sequence[Exchange]) -> Chain:
    """Return the longest chain of some exchanges."""
    ordered = sorted(exchanges, key=lambda one: one.began)
    longest: list[tuple[Exchange, ...]] = []
    for one in ordered:
        before = (chain for chain in longest if chain[-1].ended <= one.began)
        longest.append((*max(before, key=len, default=()), one))
    return Chain(max(longest, key=len, default=()))


def chain_to(exchanges: Sequence[Exchange], is_last: Callable[[Request], bool]) -> Chain:
    """Return the longest chain that ends with a request."""
    last = next(one for one in exchanges if is_last(one.request))
    before = [one for one in exchanges if one.ended <= last.began]
    return Chain((*chain_of(before).exchanges, last))


def is_commit(request: Request) -> bool:
    """Return True for the put of ``.metadata``."""
    return request.operation == "PutObject" and ".metadata" in spelled(request)


def all_of(exchanges: Sequence[Exchange]) -> str:
    """Return all exchanges as lines, for a test that failed."""
    return str(Chain(tuple(sorted(exchanges, key=lambda one: one.began))))


def spelled(request: Request) -> str:
    """Return a request's method, operation and object."""
    named = (
        request.body.split(b"\r\n\r\n", 2)[1][:200].decode(errors="replace") if _is_insert(request) else ""
    )
    path = unquote(urlsplit(request.target).path)
    return f"{request.method} {request.operation} {path} {named}".rstrip()


def _is_insert(request: Request) -> bool:
    return request.operation == "PutObject" and request.method == "POST"


def slow(proxy: Proxy, seconds: float) -> None:
    """Have every answer come so many seconds late, and forget what was seen."""
    proxy.forget()
    proxy.rule(lambda _: Delay(seconds))
