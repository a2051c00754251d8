"""Reading an answer's body with few calls: the kernel waits until a buffer is full, not the interpreter.

A socket that Python gave a timeout never blocks: one call waits, and the next takes what has come so far.
Over a fast network that makes thousands of turns at the interpreter's lock. Here the kernel keeps the time.
"""

from __future__ import annotations

import io
import socket
import struct
from http.client import HTTPResponse
from typing import cast


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
    response.fp = cast(io.BufferedReader, _Blocking(response.fp, connection))
    return True


class _Blocking(io.BufferedIOBase):
    """What a response reads from: first what was read ahead with its headers, then the socket."""

    def __init__(self, ahead: io.BufferedReader, connection: socket.socket) -> None:
        self._ahead = ahead
        self._drained = False
        self._socket = connection
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
            self._drained = size == ahead
        if filled == room.nbytes:
            return filled
        try:
            return filled + self._socket.recv_into(room[filled:], flags=socket.MSG_WAITALL)
        except BlockingIOError:
            if filled:
                return filled
            raise TimeoutError("timed out") from None

    def readable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Give the socket back as it was, and close."""
        if not self.closed and self._socket.fileno() >= 0:
            self._socket.settimeout(self._timeout)
        self._ahead.close()
        super().close()
