"""Proof that hosts reach each other: the first rank of each connects to the others', as gloo will."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, cast

from cloudckpt.backends.config.endpoint_url import host_and_port
from cloudckpt.backends.errors import ExecutorError
from cloudckpt.backends.system import system_limits
from cloudckpt.executor.network import host_addresses
from cloudckpt.executor.network.members import said_by_hosts

LONGEST: Final = 10.0
"""Seconds after which an address counts as out of reach."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A host as another one tries to reach it."""

    host: str
    address: str
    port: int


class ProbeListener:
    """A socket that accepts the connections of other hosts' probes, and closes them.

    Args:
        listener: a listening socket, which belongs to this object from now on.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.port: int = listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="cloudckpt-probe", daemon=True)
        try:
            system_limits.start(self._thread)
        except ExecutorError:
            listener.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.close()


def initiates(own: str, peer: str) -> bool:
    """Return True if the process at `own` opens the connection to the one at `peer`.

    gloo's rule: the greater address connects to the smaller. A probe in the other direction would find
    firewalls that gloo never meets.
    """
    return ipaddress.ip_address(own).packed > ipaddress.ip_address(peer).packed


def failures(own_host: str, own: str, peers: Sequence[Peer], timeout: float) -> list[str]:
    """Connect to `peers`, all at once, and describe each that can't be reached within `timeout` seconds."""
    numbers = connect_all([(peer.address, peer.port) for peer in peers], timeout, source=own)
    return [
        f"host {own_host} ({own}) can't reach host {peer.host} at {host_and_port(peer.address, peer.port)}"
        f"{said_by_hosts(peer.address)}: "
        + (f"no answer within {timeout:.3g} s" if number == errno.ETIMEDOUT else os.strerror(number))
        for peer, number in zip(peers, numbers, strict=True)
        if number
    ]


def connect_all(
    targets: Sequence[tuple[str, int]],
    timeout: float,
    *,
    source: str | None = None,
    settle: float | None = None,
) -> list[int]:
    """Connect to addresses and ports, all at once, and close the connections.

    Args:
        targets: IP addresses and ports.
        timeout: seconds for all of them.
        source: local address to connect from; None leaves it to the routing table.
        settle: seconds for the others after the first has answered.

    Returns:
        An errno for each target, 0 for one that accepted, ``ETIMEDOUT`` for one that did not answer.
    """
    numbers = [errno.ETIMEDOUT] * len(targets)
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for index, (address, port) in enumerate(targets):
            connection = stack.enter_context(socket.socket(host_addresses.family_of(address)))
            connection.setblocking(False)
            try:
                if source is not None:
                    connection.bind((source, 0))
                numbers[index] = connection.connect_ex((address, port))
            except OSError as error:
                numbers[index] = error.errno or errno.EADDRNOTAVAIL
            if numbers[index] == errno.EINPROGRESS:
                numbers[index] = errno.ETIMEDOUT
                selector.register(connection, selectors.EVENT_WRITE, index)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                selector.unregister(key.fileobj)
                connection = cast("socket.socket", key.fileobj)
                numbers[key.data] = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if settle is not None and 0 in numbers:
                deadline, settle = min(deadline, time.monotonic() + settle), None
    return numbers
