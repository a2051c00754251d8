"""Reading an answer's body with few calls: the kernel waits until a buffer is full, not the interpreter.

A socket that Python gave a timeout never blocks: one call waits, and the next takes what has come so far.
Over a fast network that makes thousands of turns at the interpreter's lock. Here the kernel keeps the time.
It also wakes a reader for many bytes at once, and not for each packet that comes.
"""

from __future__ import annotations

import io
import socket
import struct
from http.client import HTTPResponse
from typing import Final, cast

_WOKEN_FOR: Final = 512 << 10
"""Bytes that have come when a read that waits goes on, unless fewer will. The kernel makes room for twice as
many; of more than it has room for, it takes as many as it has."""


def read_blocking(response: HTTPResponse) -> bool:
    """Let ``readinto`` of the response wait in the kernel from here on; False where it can't.

    It can't where bytes are deciphered on their way, which OpenSSL does 16 KiB at a time, or where the answer
    comes in chunks. The socket's timeout still holds: for a read as a whole, unless something has come.
    """
    raw = getattr(response.fp, "raw", None)
    # http.client has no public name for the socket below an answer.
    connection: object = getattr(raw, "_sock", None)
    if type(connection) is not socket.socket or response.chunked:
        return False
    response.fp = cast(io.BufferedReader, _Blocking(response.fp, connection, response.length))
    return True


class _Blocking(io.BufferedIOBase):
    """What a response reads from: first what was read ahead with its headers, then the socket.

    ``length`` is that of the body in bytes, where it is known.
    """

    def __init__(self, ahead: io.BufferedReader, connection: socket.socket, length: int | None) -> None:
        self._ahead = ahead
        self._drained = False
        self._left = length or 0
        self._socket = connection
        self._woken_for = 1
        self._timeout = connection.gettimeout()
        if self._timeout is not None:
            whole, fraction = divmod(self._timeout, 1)
            limit = struct.pack("@ll", int(whole), max(1, int(fraction * 1e6)))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            connection.settimeout(None)

    def readinto(self, target: memoryview, /) -> int:  # type: ignore[override]
        """Read until the target is full, the time is up or the other side has ended; 0 at the end."""
        room, filled = memoryview(target).cast("B"), 0
        while not self._drained and filled < room.nbytes:
            ahead = len(self._ahead.peek())  # reads once from the socket where there is nothing
            size = min(ahead, room.nbytes - filled)
            if not size:
                return filled
            self._ahead.readinto1(room[filled : filled + size])
            filled += size
            self._left -= size
            self._drained = size == ahead
        try:
            while filled < room.nbytes:
                piece = self._waited_for(room[filled:])
                came = self._socket.recv_into(piece, flags=socket.MSG_WAITALL)
                filled += came
                self._left -= came
                if came < piece.nbytes:
                    break
        except BlockingIOError:
            if not filled:
                raise TimeoutError("timed out") from None
        return filled

    def _waited_for(self, room: memoryview) -> memoryview:
        """What one call should fill: the last bytes of a body, or before them as many as it can sleep for."""
        many = self._left - _WOKEN_FOR
        self._wake_for(_WOKEN_FOR if many > 0 else 1)
        return room[:many] if many > 0 else room

    def _wake_for(self, nbytes: int) -> None:
        if nbytes != self._woken_for:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)
            self._woken_for = nbytes

    def readable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Give the socket back as it was, and close."""
        if not self.closed and self._socket.fileno() >= 0:
            self._wake_for(1)
            self._socket.settimeout(self._timeout)
        self._ahead.close()
        super().close()
