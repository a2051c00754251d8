"""Answers with bounds: on the bytes of a head and of a document, and on the seconds that both may take.

The timeout of a socket bounds each wait for bytes. A server that sends a byte now and then never exceeds it,
and http.client reads a document of any length into memory. So answers are read through a stream that counts.
"""

from __future__ import annotations

import http.client
import io
import threading
import time
import weakref
from typing import Any, Final

from botocore.awsrequest import AWSHTTPResponse

MOST: Final = 16 << 20
"""Bytes of an answer that is not an object's.

A page of a listing has 1000 names of 1024 bytes, each of which may be escaped.
"""
_MOST_OF_A_HEAD: Final = 1 << 16
_LEAST_RATE: Final = 16 << 10
"""Bytes a second that an answer has in each period of a timeout, once it has started."""


class TooLongError(http.client.HTTPException):
    """An answer has more bytes than any answer to its request."""


class _Expected(threading.local):
    is_object = False


_expected = _Expected()


def expect(*, is_object: bool) -> None:
    """Say whether the next answer that this thread reads may have any number of bytes, as an object's has."""
    _expected.is_object = is_object


class Stream(io.RawIOBase):
    """A raw stream over a socket that counts bytes, and seconds of waiting.

    Args:
        raw: the socket's own stream.
        most: bytes after which it fails; None for any number.
        has_end: False where the end of the connection is an error.
    """

    def __init__(self, raw: Any, most: int | None = MOST, *, has_end: bool = True) -> None:
        self._raw = raw
        self._sock = raw._sock  # noqa: SLF001 - where body_loop and others look for the socket
        self._most = most
        self._has_end = has_end
        self._received = 0
        self._waited: float | None = None
        """Seconds in this period; None before the first byte, for which the socket's timeout is enough."""
        self._before = 0
        """Bytes before this period."""

    def allow(self, most: int | None) -> None:
        """Allow so many bytes from here on, and begin a period."""
        self._most = None if most is None else self._received + most
        self._waited, self._before = 0.0, self._received

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        """Read bytes that have arrived, and wait for the first of them.

        Raises:
            TimeoutError: too few have arrived of late.
            TooLongError: too many have.
        """
        timeout = self._sock.gettimeout()
        began = time.monotonic()
        count: int | None = self._raw.readinto(buffer)
        if count == 0 and not self._has_end:
            raise http.client.RemoteDisconnected("the connection ended within the head of an answer")
        if not count:
            return count
        self._received += count
        if self._most is not None and self._received > self._most:
            raise TooLongError(f"more than {self._most:,} bytes, where an answer has fewer")
        if self._waited is None:
            self._waited = 0.0
        else:
            self._waited += time.monotonic() - began
        if timeout and self._waited >= timeout:
            moved = self._received - self._before
            if moved < timeout * _LEAST_RATE:
                raise TimeoutError(f"{moved:,} bytes in {self._waited:.0f} s")
            self._waited, self._before = 0.0, self._received
        return count

    def close(self) -> None:
        """Close the stream, and let the socket's be closed."""
        if not self.closed:
            self._raw.close()
        super().close()

    def fileno(self) -> int:
        """Return the descriptor of the socket."""
        return int(self._raw.fileno())


class _Bounded(http.client.HTTPResponse):
    """A mixin for the answers of http.client."""

    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._most = None if _expected.is_object else MOST
        self._stream: Stream | None = None
        if isinstance(self.fp, io.BufferedReader) and hasattr(self.fp.raw, "_sock"):
            raw = self.fp.detach()
            self._stream = Stream(raw)
            self.fp = io.BufferedReader(self._stream)
            # An answer that is dropped unread, in a cycle with an error, gives its socket back at once.
            weakref.finalize(self, raw.close).atexit = False

    def begin(self) -> None:
        """Read the head.

        Raises:
            TooLongError: it promises more bytes than such an answer has.
        """
        super().begin()
        if self.status >= http.client.MULTIPLE_CHOICES:
            self._most = MOST
        if self._stream is not None:
            # What was read ahead counts for the head, of which there are a few KiB at most.
            self._stream.allow(self._most)
        if self._most is not None and self.length is not None and self.length > self._most:
            length = self.length
            self.close()
            raise TooLongError(f"{length:,} bytes, where such an answer has {self._most:,} at most")


class Response(_Bounded):
    """An answer of http.client with bounds."""


class EarlyResponse(_Bounded, AWSHTTPResponse):
    """The same of an answer whose first line was read before the body of its request was sent."""


class FirstLine:
    """A socket for botocore to read the answer to ``Expect: 100-continue`` from: with bounds.

    Args:
        sock: the socket.
    """

    def __init__(self, sock: Any) -> None:
        self.sock = sock

    def makefile(self, mode: str, buffering: int) -> Stream:
        """Return a stream over the socket. botocore reads lines for ever after the end of the connection."""
        return Stream(self.sock.makefile(mode, buffering), _MOST_OF_A_HEAD, has_end=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)
