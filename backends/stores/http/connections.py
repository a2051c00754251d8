"""urllib3's connections, with the bodies of requests and answers moved by `body_loop`.

Heads, proxies, tunnels, certificates and timeouts stay urllib3's and botocore's. Where a body cannot be
handed over (TLS within TLS, a chunked answer, a response that botocore verifies), it is moved by the thread
that makes the request, as urllib3 does.
"""

from __future__ import annotations

import functools
import io
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from typing import Any, Final

from botocore.awsrequest import AWSHTTPConnection, AWSHTTPSConnection
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from cloudckpt.backends.stores.base import Arrived
from cloudckpt.backends.stores.buffer_batches import runs
from cloudckpt.backends.stores.http import body_loop, bounded
from cloudckpt.backends.stores.http.rates import rates
from cloudckpt.backends.stores.http.reach import Reaching
from cloudckpt.backends.stores.http.request_body import BuffersBody, Rest

_WINDOW: Final = 1 << 20
"""Bytes received before ``arrived`` is called: enough for a call, and still in the processor's cache."""
_SMALL: Final = 1 << 15
"""Bytes below which a buffer is not received into by itself: a call costs more than copying so many."""
_SCRATCH: Final = 1 << 18
"""Bytes of memory that a connection has for small buffers, beyond ``memory_limit``."""
_IN_PLACE: Final = 1 << 18
"""Bytes of a body from which it is worth handing over. Less is moved by the thread that asked."""

ReadInto = Callable[[Any], int]


class BrokenOffError(Exception):
    """A body ended before its length, or stalled."""


class _BodySender:
    """A mixin for urllib3's connections that has a loop send :class:`BuffersBody`."""

    sock: Any
    response_class: Any = bounded.Response
    _asked: float

    def request(self, method: str, url: str, body: Any = None, headers: Any = None, **options: Any) -> None:
        if isinstance(body, BuffersBody):
            body.hand_over = len(body) >= _IN_PLACE
        super().request(method, url, body=body, headers=headers, **options)  # type: ignore[misc]
        self._asked = time.monotonic()

    def getresponse(self) -> Any:
        if isinstance(early := self.response_class, functools.partial):  # botocore's, of an early answer
            self.response_class = functools.partial(bounded.EarlyResponse, **early.keywords)
        response = super().getresponse()  # type: ignore[misc]
        rates().answered(time.monotonic() - self._asked)
        return response

    def _handle_expect_response(self, message_body: Any) -> None:
        """Read the answer to ``Expect: 100-continue`` with bounds, and send the body."""
        self.sock = bounded.FirstLine(self.sock)
        try:
            super()._handle_expect_response(message_body)  # type: ignore[misc]
        finally:
            self._use_socket()

    def _use_socket(self) -> None:
        if isinstance(self.sock, bounded.FirstLine):
            self.sock = self.sock.sock

    def send(self, data: Any) -> None:
        self._use_socket()
        if not isinstance(data, Rest):
            super().send(data)  # type: ignore[misc]
        elif not getattr(self, "_response_received", False):  # botocore's: the answer came before the body
            if body_loop.movable(self.sock):
                body_loop.send(self.sock, data.body.read, len(data.body))
            else:
                while view := data.body.read():
                    super().send(view)  # type: ignore[misc]


class _AWSConnection(_BodySender, Reaching, AWSHTTPConnection):  # type: ignore[misc]
    pass


class _AWSTLSConnection(_BodySender, Reaching, AWSHTTPSConnection):  # type: ignore[misc]
    pass


class _AWSPool(HTTPConnectionPool):
    ConnectionCls = _AWSConnection  # pyright: ignore[reportAssignmentType] - urllib3 declares its own classes


class _AWSTLSPool(HTTPSConnectionPool):
    ConnectionCls = _AWSTLSConnection  # pyright: ignore[reportAssignmentType]


class _Connection(_BodySender, Reaching, HTTPConnection):
    pass


class _TLSConnection(_BodySender, Reaching, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection  # pyright: ignore[reportAssignmentType]


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection  # pyright: ignore[reportAssignmentType]


POOLS: Final[dict[str, Any]] = {"http": _Pool, "https": _TLSPool}
"""For urllib3's ``PoolManager.pool_classes_by_scheme``."""
AWS_POOLS: Final[dict[str, Any]] = {"http": _AWSPool, "https": _AWSTLSPool}
"""The same with botocore's handling of ``Expect: 100-continue``."""


def fill(
    response: Any, buffers: Sequence[memoryview], arrived: Arrived | None, otherwise: ReadInto | None = None
) -> None:
    """Fill buffers from the body of an answer.

    Args:
        response: urllib3's, whose body has not been read.
        buffers: the memory to fill, in order.
        arrived: called with the number of bytes that have been filled, on the thread of a loop or this one.
        otherwise: reads the body where it must pass through other code, which then is all that reads it.

    Raises:
        BrokenOffError: the body ends too early, stalls, or its connection is much slower than others.
    """
    size = sum(buffer.nbytes for buffer in buffers)
    views = _views(buffers, arrived)
    below = getattr(response, "_fp", None) if otherwise is None else None
    straight = below if isinstance(below, HTTPResponse) and not below.chunked else None
    connection = _socket_of(straight) if straight is not None and size >= _IN_PLACE else None
    if straight is None or connection is None:
        readinto = otherwise or (straight.readinto if straight is not None else response.readinto)
        for view in views:
            _read_fully(readinto, view)
    else:
        try:
            _receive(straight, connection, views, size)
        except (HTTPException, OSError, EOFError) as error:
            raise BrokenOffError(str(error) or type(error).__name__) from error
    if straight is not None and straight.isclosed():
        response.release_conn()  # urllib3 has not noticed that the whole body has been read


def _receive(response: HTTPResponse, connection: Any, views: Iterator[memoryview], size: int) -> None:
    early = _read_ahead(response.fp, connection, size)
    rest = _placed(early, views)
    if len(early) < size:
        body_loop.receive(connection, rest, size - len(early))
    else:
        for _ in rest:  # none is left, and `arrived` has been called
            pass
    if response.length is not None:
        response.length -= size
        if not response.length:
            response.readinto(bytearray(1))  # has http.client notice the end


def _read_ahead(buffered: Any, connection: Any, most: int) -> bytes:
    """Return the bytes that were read ahead with the answer's head, of which there are a few KiB at most."""
    timeout = connection.gettimeout()
    connection.settimeout(0)  # to look into the buffer must not wait for the socket
    try:
        count = min(len(buffered.peek()), most)
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        count = 0
    finally:
        connection.settimeout(timeout)
    return bytes(buffered.read1(count)) if count else b""


def _placed(early: bytes, views: Iterator[memoryview]) -> Iterator[memoryview]:
    """Copy the first bytes of a body into the first views, and yield what is left of the views."""
    at = 0
    for view in views:
        count = min(len(early) - at, view.nbytes)
        view[:count] = early[at : at + count]
        at += count
        if count < view.nbytes:
            yield view[count:]


def _socket_of(response: HTTPResponse) -> Any:
    """Return the socket below an answer, for which http.client has no public name; None for another kind."""
    raw = getattr(response.fp, "raw", None)
    found = getattr(raw, "_sock", None) if isinstance(response.fp, io.BufferedReader) else None
    return found if body_loop.movable(found) else None


def _views(buffers: Sequence[memoryview], arrived: Arrived | None) -> Iterator[memoryview]:
    """Yield the memory to fill: the buffers, and for small ones memory from which they are copied."""
    scratch, done = memoryview(b""), 0
    are_small = sum(buffer.nbytes for buffer in buffers) < len(buffers) * _SMALL
    for run in runs(buffers, _SCRATCH if are_small else _WINDOW):
        size = sum(piece.nbytes for piece in run)
        if size >= len(run) * _SMALL:
            yield from run
        else:
            if scratch.nbytes < size:
                scratch = memoryview(bytearray(_SCRATCH if size <= _SCRATCH else _WINDOW))
            yield scratch[:size]
            at = 0
            for piece in run:
                piece[:] = scratch[at : at + piece.nbytes]
                at += piece.nbytes
        done += size
        if arrived is not None:
            arrived(done)


def _read_fully(readinto: ReadInto, view: memoryview) -> None:
    filled = 0
    while filled < view.nbytes:
        try:
            got = readinto(view[filled:])
        except (HTTPException, OSError) as error:  # of a level below what urllib3 wraps
            raise BrokenOffError(f"after {filled:,} bytes of a buffer") from error
        if not got:
            raise BrokenOffError(f"the connection ended after {filled:,} bytes of {view.nbytes:,}")
        filled += got
