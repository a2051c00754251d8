"""A resumable session of GCS: bytes are added at its end; whoever has its URL ends it or cancels it.

What a session holds it holds in multiples of 256 KiB until it is ended. So a part that is no such multiple
leaves the rest with the caller, in the part's ``etag``, who hands it over with all parts at the end.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from cloudckpt.backends.errors import IntegrityError, StorageError
from cloudckpt.backends.store import Departed, Part
from cloudckpt.backends.stores.gcs_errors import CANCELLED, RefusedError
from cloudckpt.backends.stores.s3_body import BuffersBody

if TYPE_CHECKING:
    from cloudckpt.backends.stores.gcs_client import Client

_GRANULE: Final = 256 << 10
_MORE: Final = int(HTTPStatus.PERMANENT_REDIRECT)
"""What a session answers that has not been ended: it waits for more."""
_GONE = (HTTPStatus.NOT_FOUND, HTTPStatus.GONE, CANCELLED)


def belongs(url: str, endpoint: str, bucket: str) -> bool:
    """Whether a URL that was read somewhere is of a session of this bucket, and of no other server."""
    return url.startswith(f"{endpoint}/upload/storage/v1/b/{quote(bucket, safe='')}/o?")


class Session:
    """One session."""

    def __init__(self, url: str) -> None:
        self._url = url

    def part(self, offset: int, buffers: Sequence[memoryview], departed: Departed | None) -> Sending:
        """Make ready to add the bytes in ``buffers``, the first of which is the object's at ``offset``."""
        return Sending(self, offset, buffers, departed)

    def ending(self, parts: Sequence[Part]) -> Callable[[Client], dict[str, Any]]:
        """What ends the session, and returns the object's resource.

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
            resource: dict[str, Any] = json.loads(said)
            if int(resource["size"]) != size:
                raise IntegrityError(f"the object has {resource['size']} bytes, and its parts {size}")
            return resource

        return end

    def cancel(self, client: Client) -> None:
        """Give the session up; one that is gone already is no error."""
        answer = client.request("abort an upload", "DELETE", self._url, body=b"", fine=_GONE)
        answer.drain_conn()
        answer.release_conn()

    def is_open(self, client: Client) -> bool:
        """Whether bytes can still be added."""
        body, fine = b"", (_MORE, *_GONE)
        headers = {"Content-Range": "bytes */*"}
        answer = client.request("upload", "PUT", self._url, headers=headers, body=body, fine=fine)
        answer.drain_conn()
        answer.release_conn()
        return answer.status == _MORE

    def held(self, client: Client) -> int:
        """Bytes that the session holds."""
        status, _, held = self.ask(client, "upload", "bytes */*", b"")
        if status != _MORE:
            raise StorageError("the upload has been completed already")
        return held

    def ask(
        self, client: Client, doing: str, range_: str, body: BuffersBody | bytes
    ) -> tuple[int, bytes, int]:
        """Put something to the session: the status and body of its answer, and how much it holds."""
        try:
            answer = client.request(
                doing, "PUT", self._url, headers={"Content-Range": range_}, body=body, fine=(_MORE,)
            )
        except RefusedError as error:
            if error.status in _GONE:
                message = "the upload does not exist: it was completed, aborted or has expired"
                raise StorageError(message) from error
            raise
        said = answer.data
        last = answer.headers.get("Range", "").rpartition("-")[2]
        return answer.status, said, int(last) + 1 if last else 0


class Sending:
    """A part on its way; it is begun again where the session's own account says, not from the start."""

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
        self._tried = False
        self.tail = base64.b64encode(b"".join(cut(buffers, self._size))).decode()
        """What the session can't take yet, in base64."""

    def go_on(self, client: Client) -> None:
        """Send what the session does not hold yet."""
        # The first try trusts the caller: asking costs a request. One without bytes asks whether it lives.
        held = self._session.held(client) if self._tried or not self._size else self._offset
        self._tried = True
        while held < self._offset + self._size:
            if held < self._offset:
                raise StorageError(f"the upload holds {held} bytes, and this part begins at {self._offset}")
            held = self._send(client, held)
        if self._departed is not None:
            self._departed(self.size)

    def _send(self, client: Client, start: int) -> int:
        done = start - self._offset
        views = cut(self._buffers, done, self._size)
        departed = self._departed

        def told(count: int) -> None:
            if departed is not None:
                departed(done + count)

        range_ = f"bytes {start}-{self._offset + self._size - 1}/*"
        status, _, held = self._session.ask(client, "upload", range_, BuffersBody(views, told))
        if status != _MORE:
            raise StorageError("the upload has been completed already")
        if held <= start:
            raise StorageError(f"the upload took none of {self._size - done} bytes")
        return held


def cut(buffers: Sequence[memoryview], start: int, stop: int | None = None) -> list[memoryview]:
    """The buffers' bytes from ``start`` to ``stop``, laid end to end, without copying."""
    found: list[memoryview] = []
    at = 0
    for buffer in buffers:
        first = max(0, start - at)
        last = buffer.nbytes if stop is None else min(buffer.nbytes, stop - at)
        if first < last:
            found.append(buffer[first:last])
        at += buffer.nbytes
    return found
