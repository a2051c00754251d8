"""Reading S3 objects: whole, or a range straight into buffers.

Each function is one attempt. A body that breaks off is asked for again from its start, of the version that
is there then, so that bytes of two versions never mix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

from botocore.exceptions import HTTPClientError, IncompleteReadError
from botocore.response import StreamingBody

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.stores.base import Arrived
from cloudckpt.backends.stores.failure_causes import Route, ended_cure, words
from cloudckpt.backends.stores.http.connections import BrokenOffError, fill
from cloudckpt.backends.stores.http.content_range import whole_size
from cloudckpt.backends.stores.s3.client import Clients
from cloudckpt.backends.stores.s3.errors import BrokenBodyError, not_s3, without_etag
from cloudckpt.backends.stores.size_limit import check_whole

_PIECE: Final = 8 << 20


def read_whole(
    clients: Clients, arguments: dict[str, Any], target: Target, name: str
) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes of an object and the answer that they came with.

    Raises:
        IntegrityError: there are more than `check_whole` allows.
    """
    answer = clients.data.get_object(**arguments)
    with _body(answer, clients.route) as body:
        if not answer.get("ETag"):
            raise without_etag(clients.route, "GetObject", answer)
        if "ContentRange" in answer:
            raise not_s3(clients.route, answer, "a range of the object, where all of it was asked for")
        check_whole(target, name, answer.get("ContentLength") or 0)
        pieces: list[bytes] = []
        size = 0
        while piece := body.read(_PIECE):  # the length that an answer promises may be any number, or none
            pieces.append(piece)
            size += len(piece)
            check_whole(target, name, size)
        return b"".join(pieces), answer


def read_range(
    clients: Clients,
    arguments: dict[str, Any],
    offset: int,
    buffers: Sequence[memoryview],
    arrived: Arrived | None = None,
) -> int | None:
    """Fill ``buffers`` from the object's bytes at ``offset``, in one request.

    ``arrived`` is called with the number of bytes filled, and 0 before. Return the object's whole size in
    bytes, where the answer gives it.
    """
    size = sum(buffer.nbytes for buffer in buffers)
    if not size:
        return None
    answer = clients.data.get_object(**arguments, Range=f"bytes={offset}-{offset + size - 1}")
    if arrived is not None:
        arrived(0)
    with _body(answer, clients.route) as body:
        whole = _whole_size(answer, offset, size, clients.route)
        _fill(body, buffers, arrived)
        return whole


@contextlib.contextmanager
def _body(answer: dict[str, Any], route: Route) -> Iterator[StreamingBody]:
    """Close the body at the end of the block; its connection is kept only if it was read whole."""
    with contextlib.closing(answer["Body"]) as body:
        try:
            yield body
        except (HTTPClientError, IncompleteReadError, BrokenOffError) as error:
            said = f"the answer of {route} broke off while it was read ({words(error)})"
            raise BrokenBodyError(said, hint=ended_cure(route)) from error


def _whole_size(answer: dict[str, Any], offset: int, size: int, route: Route) -> int | None:
    """Return the size of the whole object, once the answer is found to have the range."""
    if not answer.get("ETag"):
        raise without_etag(route, "GetObject", answer)
    return whole_size(
        status=answer["ResponseMetadata"]["HTTPStatusCode"],
        given=answer.get("ContentRange"),
        length=answer.get("ContentLength"),
        offset=offset,
        size=size,
        server=str(route),
    )


def _fill(body: StreamingBody, buffers: Sequence[memoryview], arrived: Arrived | None) -> None:
    raw = getattr(body, "_raw_stream", None)
    # Not straight from the connection where storage_options ask botocore to check what it reads.
    checked = type(body) is not StreamingBody
    fill(raw, buffers, arrived, body.readinto if checked or raw is None else None)
