"""Features that an S3 server supports, found by probing, and remembered for the process.

S3 itself is not probed. Any other server is, once a process and bucket: servers differ in conditions, and
some take a header without acting on it. So each condition is tried twice: once where it holds, which the
server must accept, and once where it does not, which the server must refuse. ``If-Match`` is tried with the
entity tag in quotes, as RFC 9110 has it, and without: Ceph RGW 16 refuses a correct tag in quotes.

Each group of features is probed when it is first needed, with hidden objects below the store's prefix, which
the probe deletes.
"""

from __future__ import annotations

import enum
import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from botocore.exceptions import ClientError

from cloudckpt.backends.checksums import ALGORITHMS, CRC32C, CRC64NVME
from cloudckpt.backends.stores.object_names import probe_name
from cloudckpt.backends.stores.retry import Outcome
from cloudckpt.backends.stores.s3.checksums import content_md5, parameters
from cloudckpt.backends.stores.s3.client import Clients
from cloudckpt.backends.stores.s3.errors import is_of_credentials, status_of
from cloudckpt.backends.stores.s3.requests import Requests
from cloudckpt.backends.system import background_log
from cloudckpt.backends.system.printable import one_line

_log = background_log.logger(__name__)

_ANOTHER_TAG: Final = "0" * 32
"""The entity tag of no object of the probe."""
_AGAIN: Final = 2
"""Times that a condition is tried again where an attempt before may have won, for its answer was lost."""
_UNSUPPORTED: Final = (HTTPStatus.BAD_REQUEST, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)
_REFUSED: Final = (*_UNSUPPORTED, HTTPStatus.PRECONDITION_FAILED, HTTPStatus.NOT_FOUND)


class TagForm(enum.Enum):
    """The form in which a server takes an entity tag in a condition."""

    QUOTED = '"{}"'
    UNQUOTED = "{}"

    def of(self, version: str) -> str:
        """Return the value of the header for a version, which is an entity tag without quotes."""
        return self.value.format(version)


@dataclass(frozen=True, slots=True)
class PutSupport:
    """Conditions and checksums that a server supports on PUT."""

    create: bool
    """``If-None-Match: *`` refuses a put where an object exists, and no other."""
    update: TagForm | None
    """The form in which ``If-Match`` accepts the object's tag and refuses another; None for neither."""
    checksum: str | None
    """The algorithm of the checksum to send with each part: one that the server verifies or demands."""
    content_md5: bool = False
    """The server demands Content-MD5 with each part, and takes no CRC in its place."""


@dataclass(frozen=True, slots=True)
class S3Capabilities:
    """All that was probed of one server, for ``doctor`` and the documentation."""

    put: PutSupport
    complete_create: bool
    """``If-None-Match: *`` on CompleteMultipartUpload."""
    copy_source: TagForm | None
    """``x-amz-copy-source-if-match`` on CopyObject."""

    def __str__(self) -> str:
        """Name the supported features, then the others."""
        features = {
            "If-None-Match on PUT": self.put.create,
            "If-Match on PUT" + _without_quotes(self.put.update): self.put.update is not None,
            "If-None-Match on CompleteMultipartUpload": self.complete_create,
            "If-Match of a copy's source" + _without_quotes(self.copy_source): self.copy_source is not None,
        }
        named = {
            "supported": [name for name, supported in features.items() if supported],
            "not supported": [name for name, supported in features.items() if not supported],
        }
        return "; ".join(f"{title}: {', '.join(names)}" for title, names in named.items() if names)


def _without_quotes(form: TagForm | None) -> str:
    return " (entity tags without quotes)" if form is TagForm.UNQUOTED else ""


_AWS: Final = PutSupport(create=True, update=TagForm.QUOTED, checksum=CRC64NVME.name)


class Server:
    """One bucket's server, as this process has found it. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._put: PutSupport | None = None
        self._complete: bool | None = None
        self._copy: tuple[TagForm | None] | None = None
        self.deletes_in_batches = True
        """False once the server has refused DeleteObjects and taken DeleteObject."""
        self.completion_names_version: bool | None = None
        """True if the entity tag in the answer to CompleteMultipartUpload is that of the object, as on AWS.

        rclone answers with the tag that S3 makes of the parts', and gives the object another one. None until
        both have been seen.
        """

    def put(self, requests: Requests, bucket: str, prefix: str) -> PutSupport:
        """Return what the server supports on PUT; probing takes six to twelve requests, once."""
        if requests.clients.is_aws:
            return _AWS
        with self._lock:
            if self._put is None:
                with _Probe(requests, bucket, prefix).cleaned_up() as probe:
                    self._put = probe.put_support()
            return self._put

    @property
    def is_probed(self) -> bool:
        """True if `put` answers without a request."""
        return self._put is not None

    def copy_source(self, requests: Requests, bucket: str, prefix: str) -> TagForm | None:
        """Return the form in which CopyObject takes the source's entity tag, None where it ignores it."""
        if requests.clients.is_aws:
            return TagForm.QUOTED
        with self._lock:
            if self._copy is None:
                with _Probe(requests, bucket, prefix).cleaned_up() as probe:
                    self._copy = (probe.copy_source(),)
            return self._copy[0]

    def complete_create(self, requests: Requests, bucket: str, prefix: str) -> bool:
        """Return True if CompleteMultipartUpload supports ``If-None-Match: *``."""
        if requests.clients.is_aws:
            return True
        with self._lock:
            if self._complete is None:
                with _Probe(requests, bucket, prefix).cleaned_up() as probe:
                    self._complete = probe.complete_create()
            return self._complete

    def all(self, requests: Requests, bucket: str, prefix: str) -> S3Capabilities:
        """Return all of the above."""
        where = (requests, bucket, prefix)
        return S3Capabilities(self.put(*where), self.complete_create(*where), self.copy_source(*where))


_servers: dict[tuple[int, str, str], Server] = {}
_lock = threading.Lock()


def server_of(requests: Requests, bucket: str) -> Server:
    """Return the record of a bucket's server in this process."""
    place = (os.getpid(), requests.clients.endpoint, bucket)
    with _lock:
        return _servers.setdefault(place, Server())


def forget_servers() -> None:
    """Forget every server, so that the next use probes it again."""
    with _lock:
        _servers.clear()


class _Probe:
    """Requests that try one server, and the hidden objects that they leave."""

    def __init__(self, requests: Requests, bucket: str, prefix: str) -> None:
        self._requests = requests
        self._bucket = bucket
        self._prefix = prefix
        self._keys: list[str] = []
        self._bodies = itertools.count()

    @contextmanager
    def cleaned_up(self) -> Iterator[_Probe]:
        """Delete the objects of the probe when the block ends.

        An object that can't be deleted is logged: a job without that permission can save even so.
        """
        try:
            yield self
        finally:
            for key in self._keys:
                if error := self._send("delete_object", key).error:
                    place = one_line(f"s3://{self._bucket}/{key}")
                    _log.warning("%s: a probe could not be deleted: %s", place, one_line(error))

    def put_support(self) -> PutSupport:
        """Try the conditions and checksums of a put on one object."""
        key = self._new_key()
        first = self._put(key, IfNoneMatch="*")
        for _ in range(_AGAIN):
            if first.lost and _is_precondition(first):
                key = self._new_key()
                first = self._put(key, IfNoneMatch="*")
        second = self._put(key) if _is_refused(first) else self._put(key, IfNoneMatch="*")
        create = not _is_refused(first) and _is_precondition(second)
        tag = _tag(first if create else second)  # a plain put that fails is no matter of conditions
        update = self._update(key, tag)
        checksum, demanded = self._checksum(key)
        return PutSupport(create, update, checksum, content_md5=demanded and checksum is None)

    def copy_source(self) -> TagForm | None:
        """Try the condition of a copy in both forms."""
        key, copy = self._new_key(), self._new_key()
        tag = _tag(self._put(key))
        source: dict[str, Any] = {"CopySource": {"Bucket": self._bucket, "Key": key}}
        for form in TagForm:
            right = self._send("copy_object", copy, **source, CopySourceIfMatch=form.of(tag))
            if isinstance(right.error, ClientError) and status_of(right.error) == HTTPStatus.FORBIDDEN:
                return None  # a job that may not copy sends the bytes
            if _is_refused(right):
                if not _is_precondition(right):
                    return None
                continue
            wrong = self._send("copy_object", copy, **source, CopySourceIfMatch=form.of(_ANOTHER_TAG))
            if _is_precondition(wrong):
                return form
        return None

    def complete_create(self) -> bool:
        """Try the condition of a completion on a new name, and on one where an object exists."""
        key = self._new_key()
        return not _is_refused(self._complete(key)) and _is_precondition(self._complete(key))

    def _update(self, key: str, tag: str) -> TagForm | None:
        for form in TagForm:
            right = self._put(key, IfMatch=form.of(tag))
            for _ in range(_AGAIN):
                if right.lost and _is_precondition(right):
                    tag = _tag(self._put(key))
                    right = self._put(key, IfMatch=form.of(tag))
            if _is_refused(right):
                if not _is_precondition(right):
                    return None  # the header itself is refused, in any form
                continue
            tag = _tag(right)
            wrong = self._put(key, IfMatch=form.of(_ANOTHER_TAG))
            if _is_precondition(wrong):
                return form
            tag = _tag(wrong)
        return None

    def _checksum(self, key: str) -> tuple[str | None, bool]:
        """Return the CRC to send with parts, and True if the server demands a checksum of some kind."""
        if self._verifies(key, CRC64NVME.name):
            return CRC64NVME.name, False
        if not _is_refused(self._put(key, ContentMD5=None)):
            return None, False
        # The bucket demands a checksum, as one with a default retention of Object Lock does.
        for algorithm in (CRC64NVME.name, CRC32C.name):
            data = self._body()
            right = parameters(ALGORITHMS[algorithm].text(ALGORITHMS[algorithm].of(data)))
            if not _is_refused(self._put(key, data, ContentMD5=None, **right)):
                return algorithm, True
        return None, True

    def _verifies(self, key: str, algorithm: str) -> bool:
        """Return True if the server refuses a wrong checksum and accepts the right one."""
        data = self._body()
        value = ALGORITHMS[algorithm].of(data)
        wrong, right = (parameters(ALGORITHMS[algorithm].text(one)) for one in (value ^ 1, value))
        refused = _is_refused(self._put(key, data, ContentMD5=None, **wrong))
        return refused and not _is_refused(self._put(key, data, ContentMD5=None, **right))

    def _complete(self, key: str) -> Outcome[dict[str, Any]]:
        upload = {"UploadId": self._send("create_multipart_upload", key).result()["UploadId"]}
        data = self._body()
        part = self._send("upload_part", key, PartNumber=1, Body=data, ContentMD5=content_md5(data), **upload)
        listed = {"Parts": [{"PartNumber": 1, "ETag": part.result()["ETag"]}]}
        completed = self._send(
            "complete_multipart_upload", key, MultipartUpload=listed, IfNoneMatch="*", **upload
        )
        if _is_refused(completed) and self._send("abort_multipart_upload", key, **upload).error:
            # A job that may not abort an upload can complete it, and the object is deleted.
            self._send("complete_multipart_upload", key, MultipartUpload=listed, **upload)
        return completed

    def _put(self, key: str, data: bytes | None = None, **own: Any) -> Outcome[dict[str, Any]]:
        """Put an object with a Content-MD5, unless ``own`` says otherwise."""
        data = self._body() if data is None else data
        given = {"ContentMD5": content_md5(data), **own}
        return self._send(
            "put_object", key, Body=data, **{name: one for name, one in given.items() if one is not None}
        )

    def _body(self) -> bytes:
        """Return bytes that no other object of the probe has, and so another entity tag."""
        return f"{next(self._bodies)}".encode()

    def _new_key(self) -> str:
        self._keys.append(f"{self._prefix}{probe_name()}")
        return self._keys[-1]

    def _send(self, method: str, key: str, **own: Any) -> Outcome[dict[str, Any]]:
        def send(clients: Clients) -> dict[str, Any]:
            arguments = clients.arguments(method, Bucket=self._bucket, Key=key, **own)
            answer: dict[str, Any] = getattr(clients.data, method)(**arguments)
            return answer

        return self._requests.outcome(send)


def _is_refused(outcome: Outcome[dict[str, Any]]) -> bool:
    """Return True if the server refused a request for what it asked.

    Raises:
        Exception: it failed for another reason, such as credentials.
    """
    error = outcome.error
    if error is None:
        return False
    if not isinstance(error, ClientError) or is_of_credentials(error) or status_of(error) not in _REFUSED:
        raise error
    return True


def _is_precondition(outcome: Outcome[dict[str, Any]]) -> bool:
    """Return True if the server refused a request for its condition."""
    return _is_refused(outcome) and status_of(outcome.error) == HTTPStatus.PRECONDITION_FAILED  # type: ignore[arg-type]


def _tag(outcome: Outcome[dict[str, Any]]) -> str:
    """Return the entity tag of the object that was put, without quotes."""
    return str(outcome.result().get("ETag", "")).strip('"')
