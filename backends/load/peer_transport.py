"""Connections between the ranks of one load that run on one host: Unix sockets without a file.

Their names mean something in one network namespace alone, and processes of other users are turned away: who
may not read the checkpoint can't have its bytes from here. A rank that can't be reached, ends, or says
nothing for too long is lost to this load; it is never waited for longer.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import socket
import struct
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Self

from cloudckpt.backends.system import descriptors

_HELLO = struct.Struct("@BI")
"""What a call is for, and which rank it comes from."""
_LENGTH = struct.Struct("@Q")
_CREDENTIALS = struct.Struct("@iII")
"""Process, user and group."""
_BUFFERS = 1024
"""That one system call takes at most."""
_WAITING = 1024
"""Calls that may wait to be answered."""
_LARGEST = 1 << 30
"""Bytes of what is said at once."""
_LONGEST = 86_400.0
"""Seconds of patience; the kernel takes no more than some numbers of them."""


class LostPeerError(Exception):
    """Another rank of this load can't be reached any more."""


class Purpose(IntEnum):
    """The purpose of a connection."""

    PLAN = 1
    BYTES = 2


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """The address at which other ranks of the host connect to a rank; travels in plans."""

    host: str
    """The same for all that can reach each other."""
    address: str
    memory_limit: int
    """Bytes that the rank may hold beyond its state."""


class PeerConnection:
    """A connection to another rank. Seconds that one call may take are bounded by ``patience``."""

    def __init__(self, connection: socket.socket, patience: float) -> None:
        self._socket = connection
        # The kernel keeps the time: with a timeout of Python's, every call would be two.
        connection.settimeout(None)
        self.bound(patience)

    def bound(self, patience: float) -> None:
        """Change how many seconds one call may take."""
        self._patience = min(patience, _LONGEST)
        whole, fraction = divmod(self._patience, 1)
        limit = struct.pack("@ll", int(whole), max(1, int(fraction * 1e6)))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the other side know that nothing more comes; wakes a thread that waits here."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def say(self, what: object) -> None:
        """Send an object.

        Raises:
            LostPeerError: the other side is gone or does not listen.
        """
        data = pickle.dumps(what)
        self.send([memoryview(_LENGTH.pack(len(data))), memoryview(data)])

    def hear(self) -> Any:
        """Receive what the other side says; it is a process of the same user, and of the same load.

        Raises:
            LostPeerError: the other side is gone, says nothing, or nothing that can be understood.
        """
        head = bytearray(_LENGTH.size)
        self.fill([memoryview(head)])
        (length,) = _LENGTH.unpack(head)
        if length > _LARGEST:
            raise LostPeerError(f"it wants to say {length} bytes")
        data = bytearray(length)
        self.fill([memoryview(data)])
        try:
            return pickle.loads(data)  # noqa: S301 - as DCP's own collectives do
        except Exception as error:
            raise LostPeerError(f"it can't be understood: {error}") from error

    def send(self, buffers: Sequence[memoryview]) -> None:
        """Send what is in the buffers.

        Raises:
            LostPeerError: the other side is gone or does not listen.
        """
        self._through(buffers, self._socket.sendmsg)

    def fill(self, buffers: Sequence[memoryview]) -> None:
        """Receive until the buffers are full.

        Raises:
            LostPeerError: the other side is gone or says nothing.
        """
        self._through(buffers, lambda views: self._socket.recvmsg_into(views, 0, socket.MSG_WAITALL)[0])

    def _through(self, buffers: Sequence[memoryview], move: Any) -> None:
        left = [buffer for buffer in buffers if buffer.nbytes]
        first = 0
        while first < len(left):
            batch, began = left[first : first + _BUFFERS], time.monotonic()
            try:
                moved = move(batch)
            except OSError as error:
                raise LostPeerError(str(error)) from error
            if not moved:
                raise LostPeerError("it has closed the connection")
            late = time.monotonic() - began >= self._patience
            if late and moved < sum(buffer.nbytes for buffer in batch):
                raise LostPeerError(f"it stood still for {self._patience:g} s")
            while first < len(left) and moved >= left[first].nbytes:
                moved -= left[first].nbytes
                first += 1
            if moved:
                left[first] = left[first][moved:]


class PeerListener:
    """A socket on which the other ranks of a load connect to this one."""

    def __init__(self, about: str, memory_limit: int) -> None:
        """Open the door to ranks that load what ``about`` names; ``memory_limit`` is this one's, in bytes."""
        self._socket = descriptors.unix_socket()
        name = f"cloudckpt-{secrets.token_hex(16)}"
        self._socket.bind(_abstract(name))
        self._socket.listen(_WAITING)
        self._arrived: dict[tuple[int, int], PeerConnection] = {}
        self.door = PeerAddress(f"{_host()} {about}", name, memory_limit)

    @classmethod
    def opened(cls, about: str, memory_limit: int) -> Self | None:
        """Return a listener; None where the system has none."""
        if sys.platform != "linux":
            return None
        try:
            return cls(about, memory_limit)
        except OSError:
            return None

    def close(self) -> None:
        """Turn everybody away."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # a process that was forked meanwhile has it open, too
        self._socket.close()
        for link in self._arrived.values():
            link.close()
        self._arrived.clear()

    def expect(
        self, purpose: Purpose, ranks: Iterable[int], wait: float, patience: float
    ) -> dict[int, PeerConnection]:
        """Wait up to ``wait`` seconds until all ranks have called; those that have."""
        missing, deadline = {(purpose.value, rank) for rank in ranks}, time.monotonic() + wait
        found: dict[int, PeerConnection] = {}
        while True:
            for key in missing & self._arrived.keys():
                found[key[1]] = self._arrived.pop(key)
                missing.discard(key)
            left = deadline - time.monotonic()
            if not missing or left <= 0:
                return found
            try:
                self._let_in(left, patience)
            except TimeoutError:
                continue
            except OSError:
                return found

    def _let_in(self, wait: float, patience: float) -> None:
        self._socket.settimeout(wait)
        connection = descriptors.unix_socket(self._socket.accept()[0])
        if _user(connection) != os.geteuid():
            connection.close()
            return
        link = PeerConnection(connection, wait)
        hello = bytearray(_HELLO.size)
        try:
            link.fill([memoryview(hello)])
        except LostPeerError:
            link.close()
            return
        link.bound(patience)
        purpose, rank = _HELLO.unpack(hello)
        if (before := self._arrived.pop((purpose, rank), None)) is not None:
            before.close()
        self._arrived[purpose, rank] = link


def call(door: PeerAddress, purpose: Purpose, rank: int, patience: float) -> PeerConnection:
    """Connect this rank to another.

    Raises:
        LostPeerError: it is not there.
    """
    try:
        connection = descriptors.unix_socket()
    except OSError as error:
        raise LostPeerError(str(error)) from error
    try:
        connection.settimeout(min(patience, _LONGEST))
        connection.connect(_abstract(door.address))
        if _user(connection) != os.geteuid():
            raise LostPeerError("a process of another user is in its place")
        link = PeerConnection(connection, patience)
        link.send([memoryview(_HELLO.pack(purpose, rank))])
    except OSError as error:
        connection.close()
        raise LostPeerError(str(error)) from error
    except BaseException:
        connection.close()
        raise
    return link


def _abstract(name: str) -> str:
    return f"\0{name}"


def _host() -> str:
    """Return an id of this boot of this machine, and of the network namespace of abstract names."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/net').readlink()}"


def _user(connection: socket.socket) -> int:
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user: int = _CREDENTIALS.unpack(data)[1]
    return user
