"""Reading S3 objects: whole, or a range straight into buffers.

Each function is one attempt. A body that breaks off is asked for again from its start and of whatever version
is there then, so that bytes of two versions never mix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from typing import Any

from botocore.exceptions import HTTPClientError, IncompleteReadError
from botocore.response import StreamingBody

from cloudckpt.backends.errors import IntegrityError, StorageError
from cloudckpt.backends.store import Arrived
from cloudckpt.backends.stores.runs import runs
from cloudckpt.backends.stores.s3_client import Clients
from cloudckpt.backends.stores.s3_errors import BrokenBodyError, not_s3
from cloudckpt.backends.stores.s3_socket import read_blocking

_ReadInto = Callable[[Any], int]

_WINDOW = 1 << 20
"""Bytes read at once, before whoever sums them hears of it: enough to be worth a turn at the lock."""
_UNCUT = 1 << 18
"""Bytes from which a buffer is read at once, where that takes one call. Shorter calls are more calls, and
what they read is no warmer: it has waited in the kernel."""
_SMALL = 1 << 15
"""Bytes below which a buffer is not read into by itself: a call costs more than copying so many."""


def read_whole(clients: Clients, arguments: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes of an object and the answer that they came with."""
    answer = clients.data.get_object(**arguments)
    with _body(answer) as body:
        if "ETag" not in answer:
            raise not_s3(clients.endpoint)
        return body.read(), answer


def read_range(
    clients: Clients,
    arguments: dict[str, Any],
    offset: int,
    buffers: Sequence[memoryview],
    arrived: Arrived | None = None,
) -> int | None:
    """Fill ``buffers`` from the object's bytes at ``offset``, in one request.

    ``arrived`` is told how far they are filled, and 0 before. Returns the object's whole size in bytes, where
    the answer gives it.
    """
    size = sum(buffer.nbytes for buffer in buffers)
    if not size:
        return None
    answer = clients.data.get_object(**arguments, Range=f"bytes={offset}-{offset + size - 1}")
    if arrived is not None:
        arrived(0)
    with _body(answer) as body:
        _check(answer, offset, size, clients.endpoint)
        _fill(body, buffers, arrived)
        return _whole_size(answer)


@contextlib.contextmanager
def _body(answer: dict[str, Any]) -> Iterator[StreamingBody]:
    """Close the body at the end of the block; its connection is kept only if it was read whole."""
    with contextlib.closing(answer["Body"]) as body:
        try:
            yield body
        except (HTTPClientError, IncompleteReadError) as error:
            raise _broken() from error


def _broken() -> BrokenBodyError:
    return BrokenBodyError("the answer broke off while it was read")


def _check(answer: dict[str, Any], offset: int, size: int, endpoint: str) -> None:
    if "ETag" not in answer:
        raise not_s3(endpoint)
    given = answer.get("ContentRange")
    if given is None:
        if offset:
            raise StorageError(f"the endpoint {endpoint} ignores ranges")
    elif not given.startswith(f"bytes {offset}-"):
        raise StorageError(f"the endpoint {endpoint} answered with another range than was asked for")
    if answer["ContentLength"] < size:
        end = offset + answer["ContentLength"]
        raise IntegrityError(f"the object ends at byte {end}, before byte {offset + size}")


def _whole_size(answer: dict[str, Any]) -> int | None:
    """Return what stands behind the slash in ``Content-Range: bytes 0-9/100``."""
    given = answer.get("ContentRange")
    if given is None:
        return int(answer["ContentLength"])
    size = given.rpartition("/")[2]
    return int(size) if size.isdigit() else None


def _fill(body: StreamingBody, buffers: Sequence[memoryview], arrived: Arrived | None) -> None:
    straight = _below(body)
    readinto: _ReadInto = body.readinto if straight is None else straight.readinto
    uncut = _UNCUT if straight is not None and read_blocking(straight) else None
    scratch, done = memoryview(b""), 0
    for run in runs(buffers, _WINDOW, uncut=uncut):
        size = sum(piece.nbytes for piece in run)
        if size >= len(run) * _SMALL:
            for piece in run:
                _read_fully(readinto, piece)
        else:
            scratch = scratch or memoryview(bytearray(_WINDOW))
            _read_fully(readinto, scratch[:size])
            at = 0
            for piece in run:
                piece[:] = scratch[at : at + piece.nbytes]
                at += piece.nbytes
        done += size
        if arrived is not None:
            arrived(done)
    if straight is not None and straight.isclosed():
        _raw(body).release_conn()  # urllib3 has not seen that all is read


def _below(body: StreamingBody) -> HTTPResponse | None:
    """Return what urllib3 reads from, which reads straight into what it is given.

    urllib3 itself reads into memory of its own and copies from there, which costs as much again; below it is
    http.client's response, for which it has no public name. None where something else is there, or where
    ``storage_options`` ask botocore to check what it reads.
    """
    below = getattr(_raw(body), "_fp", None)
    return below if type(body) is StreamingBody and isinstance(below, HTTPResponse) else None


def _raw(body: StreamingBody) -> Any:
    return getattr(body, "_raw_stream", None)


def _read_fully(readinto: _ReadInto, piece: memoryview) -> None:
    filled = 0
    while filled < piece.nbytes:
        try:
            got = readinto(piece[filled:])
        except (HTTPException, OSError) as error:  # from below what botocore and urllib3 word errors for
            raise _broken() from error
        if not got:
            raise _broken()
        filled += got
