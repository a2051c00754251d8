"""A resumable session of GCS: bytes are added at its end. Any process that has its URL may end or cancel it.

A session holds a multiple of 256 KiB until it is ended. So a part that is no such multiple leaves the rest
with the caller, in the part's ``etag``, who hands it over with all parts at the end.

A session is asked how many bytes it holds only after a chunk whose answer was lost. Some servers take the
question for the end of the upload: on those such an upload can't be resumed.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from cloudckpt.backends.errors import IntegrityError, StorageError, UnsupportedError
from cloudckpt.backends.stores.base import Departed, Part
from cloudckpt.backends.stores.failure_causes import words
from cloudckpt.backends.stores.gcs.answers import lacking, parsed, size_of
from cloudckpt.backends.stores.gcs.capabilities import Server
from cloudckpt.backends.stores.gcs.errors import CANCELLED, GoneError, RefusedError, judge
from cloudckpt.backends.stores.http.request_body import BuffersBody
from cloudckpt.backends.stores.retry import Reply

if TYPE_CHECKING:
    from cloudckpt.backends.stores.gcs.client import Client

_GRANULE: Final = 256 << 10
_MORE: Final = int(HTTPStatus.PERMANENT_REDIRECT)
"""Status of the answer of a session that has not been ended."""
_GONE = (HTTPStatus.NOT_FOUND, HTTPStatus.GONE, CANCELLED)
_NO_CANCEL = (HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)


def belongs(url: str, endpoint: str, bucket: str) -> bool:
    """Return True for the URL of a session of this bucket and server."""
    return url.startswith(f"{endpoint}/upload/storage/v1/b/{quote(bucket, safe='')}/o?")


class WrongSizeError(IntegrityError):
    """The completed object is not as long as its parts."""

    generation: str | None = None
    """Of the object."""


class StatusUnknownError(Exception):
    """The server was not probed yet for whether a session may be asked how many bytes it holds."""


class Session:
    """One session.

    Args:
        server: the record of the bucket's server.
        url: that of the session.
    """

    def __init__(self, server: Server, url: str) -> None:
        self._server = server
        self._url = url

    def part(self, offset: int, buffers: Sequence[memoryview], departed: Departed | None) -> Sending:
        """Return what sends the bytes in ``buffers``, the first of which is the object's at ``offset``."""
        return Sending(self, offset, buffers, departed)

    def ending(self, parts: Sequence[Part]) -> Callable[[Client], dict[str, Any]]:
        """Return an attempt to end the session, which returns the object's resource.

        It raises :class:`IntegrityError` where the session does not hold what the parts add up to.
        """
        ordered = sorted(parts, key=lambda part: part.number)
        size = sum(part.size for part in ordered)
        tails = [base64.b64decode(part.etag) for part in ordered]
        if any(tails[:-1]) or [part.number for part in ordered] != list(range(1, len(ordered) + 1)):
            raise IntegrityError("the parts are not those of one upload")
        tail = tails[-1] if tails else b""
        range_ = f"bytes {size - len(tail)}-{size - 1}/{size}" if tail else f"bytes */{size}"

        def end(client: Client) -> dict[str, Any]:
            status, said, held = self.ask(client, "complete an upload", range_, tail)
            if status == _MORE:
                raise IntegrityError(f"the upload holds {held} bytes of {size}")
            resource = parsed(said, client.endpoint)
            if resource.get("size") is None:
                raise lacking("a size", client.endpoint)
            if size_of(resource["size"], client.endpoint) != size:
                error = WrongSizeError(f"the object has {resource['size']} bytes, and its parts {size}")
                error.generation = resource.get("generation")
                raise error
            return resource

        return end

    def cancel(self, client: Client) -> None:
        """Cancel the session. One that is gone is no error.

        Raises:
            UnsupportedError: the server has no such request; the session stays until it expires.
        """
        fine = (*_GONE, *_NO_CANCEL)
        answer = client.request("abort an upload", "DELETE", self._url, body=b"", fine=fine)
        answer.drain_conn()
        answer.release_conn()
        if answer.status in _NO_CANCEL:
            raise UnsupportedError(f"the endpoint {client.endpoint} does not cancel uploads")

    def is_open(self, client: Client) -> bool:
        """Return True if bytes can still be added. The server must support the question."""
        body, fine = b"", (_MORE, *_GONE)
        headers = {"Content-Range": "bytes */*"}
        answer = client.request("upload", "PUT", self._url, headers=headers, body=body, fine=fine)
        answer.drain_conn()
        answer.release_conn()
        return answer.status == _MORE

    def held(self, client: Client, lost: Exception) -> int:
        """Return the number of bytes that the session holds, after the answer to a part was lost by ``lost``.

        Raises:
            UnsupportedError: the server can't be asked.
            StatusUnknownError: the server was not probed for it yet.
        """
        known = client.is_google or self._server.known_upload_status
        if known is None:
            raise StatusUnknownError
        if not known:
            raise UnsupportedError(
                f"the answer to a part was lost ({words(lost)}), and the endpoint {client.endpoint} does not "
                "say how many bytes of an upload it holds, so that the upload can't be resumed",
                hint="Nothing was committed; save or copy again",
            ) from lost
        status, _, held = self.ask(client, "upload", "bytes */*", b"")
        if status != _MORE:
            raise _completed(client)
        return held

    def ask(
        self, client: Client, doing: str, range_: str, body: BuffersBody | bytes
    ) -> tuple[int, bytes, int]:
        """Send a request to the session; return its status, its body, and how many bytes are held."""
        try:
            answer = client.request(
                doing, "PUT", self._url, headers={"Content-Range": range_}, body=body, fine=(_MORE,)
            )
        except RefusedError as error:
            if error.status in _GONE:
                message = "the upload does not exist: it was completed, aborted or has expired"
                raise GoneError(message) from error
            raise
        said = answer.data
        last = answer.headers.get("Range", "").rpartition("-")[2]
        return answer.status, said, int(last) + 1 if last else 0


class Sending:
    """A part that is being sent. After a lost answer it goes on from the bytes that the session holds."""

    def __init__(
        self, session: Session, offset: int, buffers: Sequence[memoryview], departed: Departed | None
    ) -> None:
        self._session = session
        self._offset = offset
        self.size = sum(buffer.nbytes for buffer in buffers)
        """Bytes of the part."""
        self._size = self.size - self.size % _GRANULE
        self._buffers = buffers
        self._departed = departed
        self._held = offset
        """Bytes that the session holds, by the caller's word or its last answer."""
        self._lost: Exception | None = None
        """The error of a chunk whose answer was lost, so that the number of bytes that arrived is unknown."""
        self.tail = base64.b64encode(b"".join(cut(buffers, self._size))).decode()
        """The bytes that the session can't take yet, in base64."""

    def go_on(self, client: Client) -> None:
        """Send the bytes that the session does not hold yet.

        The first attempt trusts the caller's offset: to ask for it costs a request.
        """
        if self._lost is not None:
            self._held, self._lost = self._session.held(client, self._lost), None
        while self._held < self._offset + self._size:
            if self._held < self._offset:
                raise StorageError(
                    f"the upload holds {self._held} bytes, and this part begins at {self._offset}"
                )
            self._held = self._send(client, self._held)
        if self._departed is not None:
            self._departed(self.size)

    def _send(self, client: Client, start: int) -> int:
        done = start - self._offset
        views = cut(self._buffers, done, self._size)
        departed = self._departed

        def report(count: int) -> None:
            if departed is not None:
                departed(done + count)

        range_ = f"bytes {start}-{self._offset + self._size - 1}/*"
        try:
            status, _, held = self._session.ask(client, "upload", range_, BuffersBody(views, report))
        except Exception as error:
            self._lost = None if judge(error).reply is Reply.NEVER_ASKED else error
            raise
        if status != _MORE:
            raise _completed(client)
        if held <= start:
            raise StorageError(f"the upload took none of {self._size - done} bytes")
        return held


def _completed(client: Client) -> StorageError:
    return StorageError(
        f"the endpoint {client.endpoint} answered that the upload has been completed already",
        hint="Save or copy again. If it goes on, check endpoint_url, proxies and gateways before the server",
    )


def cut(buffers: Sequence[memoryview], start: int, stop: int | None = None) -> list[memoryview]:
    """Return the buffers' bytes from ``start`` to ``stop`` in order, without copying them."""
    found: list[memoryview] = []
    at = 0
    for buffer in buffers:
        first = max(0, start - at)
        last = buffer.nbytes if stop is None else min(buffer.nbytes, stop - at)
        if first < last:
            found.append(buffer[first:last])
        at += buffer.nbytes
    return found
