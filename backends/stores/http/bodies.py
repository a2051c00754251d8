"""Bodies of HTTP messages, moved bit by bit over sockets that do not block."""

from __future__ import annotations

import abc
import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from cloudckpt.backends.stores.http.rates import Direction, unsent_bytes

_TURN: Final = 4 << 20
"""Bytes that one connection moves before the next one has its turn."""
_WAKE_AT: Final = 512 << 10
"""Bytes that have arrived when the kernel reports a socket as readable, unless fewer are left of the body."""
_RECORD: Final = 17 << 10
"""Bytes of a TLS record. OpenSSL can hold as many that the kernel does not count any more."""

Source = Callable[[], memoryview]
"""Returns the next bytes to send, or an empty view at the end."""


class Body(abc.ABC):
    """A body that a loop moves for a thread that waits.

    Args:
        connection: its socket.
        nbytes: its size.
    """

    direction: Direction
    events: int

    def __init__(self, connection: socket.socket, nbytes: int) -> None:
        self.connection = connection
        self.nbytes = nbytes
        self.moved = 0
        self.seen = 0
        """Of ``moved``, at the last measurement of the rate."""
        self.rate = 0.0
        """Bytes a second of late."""
        self.error: BaseException | None = None
        self.has_ended = False
        self.is_cancelled = False
        self.timeout = connection.gettimeout()
        self.began = self.progressed = self.period = time.monotonic()
        """The latter is the start of a period, in which a least number of bytes must be moved."""
        self.before = 0
        """Of ``moved``, at the start of the period."""
        self.sharing = 1
        """The most bodies that the loop had at once in the period."""
        self._view = memoryview(b"")
        """The memory that is being filled or sent, up to ``_at``."""
        self._at = 0
        self._ended = threading.Lock()
        self._ended.acquire()

    @abc.abstractmethod
    def pump(self) -> bool:
        """Move bytes until the socket has none or the turn is over; True once the body has been moved."""

    @property
    def unsent(self) -> int:
        """Bytes of ``moved`` that the kernel has not sent yet."""
        return 0

    def end(self, error: BaseException | None = None) -> None:
        """Wake the thread that waits. Nothing touches the socket or the memory from here on."""
        self._view = memoryview(b"")  # the loop may hold this body for a while
        self.error = error
        self.has_ended = True
        self._ended.release()

    def wait(self) -> None:
        """Wait for the end. Interruptible by a signal's handler, on the main thread."""
        self._ended.acquire()
        self._ended.release()


class Receiving(Body):
    """A body that is received into views, which ``views`` yields in order."""

    direction: Direction = "down"
    events = selectors.EVENT_READ

    def __init__(self, connection: socket.socket, views: Iterator[memoryview], nbytes: int) -> None:
        super().__init__(connection, nbytes)
        self._views = views
        self._woken_at = 1

    def pump(self) -> bool:
        end = self.moved + _TURN
        while self.moved < end:
            if self._at == self._view.nbytes:
                following = next(self._views, None)
                if following is None:
                    return True
                self._view, self._at = following, 0
            self._fill()
        return False

    def _fill(self) -> None:
        """Fill the view as far as the socket has bytes. TLS brings 16 KiB a call: each one counts."""
        receive_into, view, at = self.connection.recv_into, self._view, self._at
        size = view.nbytes
        try:
            while at < size:
                count = receive_into(view[at:])
                if not count:
                    raise EOFError(f"the connection ended after {self.moved:,} bytes of {self.nbytes:,}")
                at += count
        finally:
            self.moved += at - self._at
            self._at = at

    def wake_late(self) -> None:
        """Have the kernel report the socket once many bytes have arrived."""
        self._wake_at(max(1, min(_WAKE_AT, self.nbytes - self.moved - _RECORD)))

    def end(self, error: BaseException | None = None) -> None:
        with contextlib.suppress(OSError):  # of a socket that failed
            self._wake_at(1)
        self._views = iter(())
        super().end(error)

    def _wake_at(self, wanted: int) -> None:
        if wanted != self._woken_at:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
            self._woken_at = wanted


class Sending(Body):
    """A body that is sent from the views that ``source`` returns."""

    direction: Direction = "up"
    events = selectors.EVENT_WRITE

    def __init__(self, connection: socket.socket, source: Source, nbytes: int) -> None:
        super().__init__(connection, nbytes)
        self._source = source

    def pump(self) -> bool:
        send, end = self.connection.send, self.moved + _TURN
        while self.moved < end:
            if self._at == self._view.nbytes:
                self._view, self._at = self._source(), 0
                if not self._view.nbytes:
                    return True
            count = send(self._view[self._at :] if self._at else self._view)
            self._at += count
            self.moved += count
        return False

    @property
    def unsent(self) -> int:
        return unsent_bytes(self.connection.fileno())

    def end(self, error: BaseException | None = None) -> None:
        self._source = _nothing
        super().end(error)


def _nothing() -> memoryview:
    return memoryview(b"")
