"""All addresses behind a server's name: new connections are spread over them, and a dead one is passed over.

S3 answers a name with several addresses, and each serves a share of the requests. Connections are opened to
one after the other, IPv6 and IPv4 alternately. Where an address does not answer at once, the next one is
tried beside it (RFC 8305), and the address is left out for a while.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

_STAGGER: Final = 0.25
"""Seconds after which the next address is tried beside the one before: RFC 8305's recommendation."""
_RESOLVED_FOR: Final = 5.0
"""Seconds for which a name's addresses are kept: S3's have as long to live."""
_DEAD_FOR: Final = 30.0
"""Seconds for which an address that could not be reached is the last to be tried."""

SocketOptions: TypeAlias = Iterable[tuple[int, int, int | bytes]]


@dataclass(frozen=True, slots=True)
class Address:
    """An address that a connection can be opened to, as ``getaddrinfo`` returns it."""

    family: int
    kind: int
    protocol: int
    sockaddr: Any


class Addresses:
    """The addresses of one host and port. Safe to use from several threads.

    Args:
        host: a name, or an address without brackets.
        port: of TCP.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._lock = threading.Lock()
        self._turn = itertools.count()
        self._found: tuple[float, tuple[Address, ...]] | None = None
        self._dead: dict[Address, float] = {}

    def connect(
        self,
        timeout: float | None,
        source_address: tuple[str, int] | None = None,
        options: SocketOptions = (),
    ) -> socket.socket:
        """Open a connection to the address whose turn it is, or to another one that can be reached.

        Args:
            timeout: seconds for all of it; None for no limit. The socket keeps it.
            source_address: address and port to connect from.
            options: of the socket, as of ``setsockopt``.

        Raises:
            socket.gaierror: the name has no address.
            TimeoutError: no address answered in time.
            OSError: no address could be reached.
        """
        race = _Race(self._in_turn(), source_address, options)
        try:
            connected = race.run(timeout)
        finally:
            with self._lock:
                self._dead.update(dict.fromkeys(race.failed, time.monotonic() + _DEAD_FOR))
        connected.settimeout(timeout)
        return connected

    def _in_turn(self) -> list[Address]:
        """Return the addresses, rotated by one each time, and those that are dead last."""
        found = self._resolved()
        with self._lock:
            now = time.monotonic()
            self._dead = {one: until for one, until in self._dead.items() if until > now}
            living = [one for one in found if one not in self._dead]
            first = next(self._turn) % max(1, len(living))
            return [*living[first:], *living[:first], *(one for one in found if one in self._dead)]

    def _resolved(self) -> tuple[Address, ...]:
        with self._lock:
            kept = self._found
        if kept is not None and time.monotonic() - kept[0] < _RESOLVED_FOR:
            return kept[1]
        infos = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        found = [Address(family, kind, protocol, at) for family, kind, protocol, _, at in infos]
        if not found:
            raise OSError(errno.EADDRNOTAVAIL, f"{self._host} has no address")
        ordered = tuple(dict.fromkeys(_by_turns(found)))
        with self._lock:
            self._found = time.monotonic(), ordered
        return ordered


def _by_turns(addresses: Sequence[Address]) -> Iterator[Address]:
    """Yield addresses, alternating between families, beginning with that of the first."""
    families = dict.fromkeys(one.family for one in addresses)
    each = [[one for one in addresses if one.family == family] for family in families]
    for row in itertools.zip_longest(*each):
        yield from (one for one in row if one is not None)


class _Race:
    """Attempts to connect to addresses in order, each started when the one before has failed or is slow."""

    def __init__(
        self,
        addresses: Sequence[Address],
        source_address: tuple[str, int] | None,
        options: SocketOptions,
    ) -> None:
        self._waiting = list(reversed(addresses))
        self._source_address = source_address
        self._options = tuple(options)
        self._selector = selectors.DefaultSelector()
        self._next = time.monotonic()
        """When the next attempt is to begin."""
        self._error: OSError = TimeoutError("timed out")
        self.failed: list[Address] = []
        """Addresses that refused, or did not answer before the race ended."""

    def run(self, timeout: float | None) -> socket.socket:
        """Return the first connection.

        Raises:
            OSError: no address could be reached.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        try:
            while self._waiting or self._selector.get_map():
                now = time.monotonic()
                if now >= deadline:
                    raise TimeoutError("timed out")
                if self._waiting and now >= self._next:
                    self._begin(self._waiting.pop())
                    continue
                until = min(deadline, self._next if self._waiting else math.inf)
                for key, _ in self._selector.select(None if until == math.inf else until - now):
                    if (connected := self._ended(key)) is not None:
                        return connected
            raise self._error
        finally:
            for key in list(self._selector.get_map().values()):
                self.failed.append(key.data)
                _socket_of(key).close()
            self._selector.close()

    def _begin(self, address: Address) -> None:
        try:
            sock = _started(address, self._source_address, self._options)
        except OSError as error:
            self._fail(address, error)
        else:
            self._selector.register(sock, selectors.EVENT_WRITE, address)
            self._next = time.monotonic() + _STAGGER

    def _ended(self, key: selectors.SelectorKey) -> socket.socket | None:
        sock = _socket_of(key)
        self._selector.unregister(sock)
        if not (number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
            return sock
        sock.close()
        self._fail(key.data, OSError(number, os.strerror(number)))
        return None

    def _fail(self, address: Address, error: OSError) -> None:
        self._error = error
        self.failed.append(address)
        self._next = time.monotonic()


def _socket_of(key: selectors.SelectorKey) -> socket.socket:
    return cast("socket.socket", key.fileobj)


def _started(
    address: Address, source_address: tuple[str, int] | None, options: SocketOptions
) -> socket.socket:
    """Return a socket that is being connected."""
    sock = socket.socket(address.family, address.kind, address.protocol)
    try:
        for option in options:
            sock.setsockopt(*option)
        sock.setblocking(False)
        if source_address is not None:
            sock.bind(source_address)
        number = sock.connect_ex(address.sockaddr)
        if number not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EINTR):
            raise OSError(number, os.strerror(number))
    except BaseException:
        sock.close()
        raise
    return sock


_lock = threading.Lock()
_known: dict[tuple[int, str, int], Addresses] = {}


def addresses_of(host: str, port: int) -> Addresses:
    """Return what this process knows of the addresses of a host; a literal may have brackets."""
    place = os.getpid(), host.strip("[]"), port
    with _lock:
        return _known.setdefault(place, Addresses(*place[1:]))
