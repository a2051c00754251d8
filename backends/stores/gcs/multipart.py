"""The requests of multipart uploads by GCS's XML API: one attempt each, without retries.

As of Google's reference, "XML API multipart uploads". An object is addressed by ``/BUCKET/OBJECT``.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import Final
from urllib.parse import quote, unquote

import urllib3

from cloudckpt.backends.errors import IntegrityError, StorageError
from cloudckpt.backends.stores.base import Departed, Part, PendingUpload, Upload
from cloudckpt.backends.stores.gcs import xml as gcs_xml
from cloudckpt.backends.stores.gcs.answers import crc32c_of, lacking
from cloudckpt.backends.stores.gcs.client import Client
from cloudckpt.backends.stores.gcs.errors import GoneError, PageError, RefusedError
from cloudckpt.backends.stores.gcs.requests import Requests
from cloudckpt.backends.stores.http.request_body import BuffersBody

_NO_BUCKET: Final = "NoSuchBucket"
_MOST_OF_AN_ANSWER: Final = 1 << 20
_MOST_OF_A_PAGE: Final = 16 << 20
"""Bytes of a page of a listing: 1000 uploads, whose names have 1024 bytes, each of which may be escaped."""
_NO_MULTIPART: Final = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.LENGTH_REQUIRED,
    HTTPStatus.PRECONDITION_FAILED,
    HTTPStatus.NOT_IMPLEMENTED,
)
"""Statuses of a server that has no multipart uploads, or none for this account."""
_OF_THE_BUCKET: Final = frozenset({_NO_BUCKET, "UserProjectMissing"})
"""Codes of a server that has them, and refuses something else."""
_STATUS_OF_CODES: Final = {
    "NoSuchUpload": HTTPStatus.NOT_FOUND,
    "SlowDown": HTTPStatus.SERVICE_UNAVAILABLE,
    "ServiceUnavailable": HTTPStatus.SERVICE_UNAVAILABLE,
}
"""Statuses of error documents that came with status 200, by code. Any other stands for status 500."""


@dataclass(frozen=True, slots=True)
class Completed:
    """The answer to a completion."""

    generation: str | None
    checksum: str | None
    """``crc32c:<base64>`` of the object, None where the answer has none."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a listing of pending uploads."""

    uploads: Sequence[PendingUpload]
    following: Mapping[str, str]
    """Parameters of the request for the next page, empty on the last."""
    truncated: bool


def object_path(requests: Requests, name: str) -> str:
    """Return the path of an object in the XML API.

    A slash of a name stays one. In a name with empty segments, ``.`` or ``..`` it is escaped, for clients and
    proxies would take those segments out of a path.
    """
    full = requests.prefix + name
    is_plain = not any(segment in ("", ".", "..") for segment in full.split("/"))
    return f"{_bucket_path(requests)}/{quote(full, safe='/' if is_plain else '')}"


def begin(requests: Requests, client: Client, name: str) -> str:
    """Begin an upload and return its ID."""
    answer = client.request(
        "begin a multipart upload",
        "POST",
        object_path(requests, name),
        parameters={"uploads": ""},
        headers={**client.payer, **requests.writing_headers, "Content-Type": "application/octet-stream"},
        body=b"",
    )
    root = _root(answer, "InitiateMultipartUploadResult", client, "begin a multipart upload")
    upload_id = gcs_xml.text(root, "UploadId").strip()
    if not upload_id:
        raise lacking("the ID of an upload", client.endpoint, "XML")
    _check_key(root, requests, name, client)
    return upload_id


def put_part(
    requests: Requests,
    client: Client,
    upload: Upload,
    number: int,
    buffers: Sequence[memoryview],
    *,
    checksum: str | None,
    departed: Departed | None,
) -> Part:
    """Send a part.

    Args:
        requests: those of the store.
        client: to send it with.
        upload: that of the part.
        number: of the part, from 1.
        buffers: the bytes of the part.
        checksum: ``crc32c:<base64>`` of the bytes, which is sent and compared with that in the answer.
        departed: called as bytes go out.

    Raises:
        GoneError: the upload was completed or aborted.
        IntegrityError: the server has other bytes than were sent.
    """
    body = BuffersBody(buffers, departed)
    sent = {"x-goog-hash": checksum.replace(":", "=", 1)} if checksum else {}
    try:
        answer = client.request(
            "upload a part",
            "PUT",
            object_path(requests, upload.name),
            parameters={"partNumber": str(number), "uploadId": upload.upload_id},
            headers={**client.payer, **sent},
            body=body,
        )
    except RefusedError as error:
        raise _gone(error) from error
    answer.drain_conn()
    answer.release_conn()
    etag = answer.headers.get("ETag")
    if not etag:
        raise lacking("the ETag of a part", client.endpoint, "XML")
    stored = crc32c_of(answer.headers)
    if checksum and stored and stored != checksum:
        raise IntegrityError(f"the server has {stored} of part {number}, and {checksum} was sent")
    return Part(number, len(body), etag, checksum or stored)


def complete(requests: Requests, client: Client, upload: Upload, parts: Sequence[Part]) -> Completed:
    """Complete an upload.

    Raises:
        GoneError: the upload was completed or aborted.
        RefusedError: the server answered with another error, also with one in an answer of status 200.
    """
    doing = "complete a multipart upload"
    try:
        answer = client.request(
            doing,
            "POST",
            object_path(requests, upload.name),
            parameters={"uploadId": upload.upload_id},
            headers={**client.payer, "Content-Type": "application/xml"},
            body=gcs_xml.parts_list((part.number, part.etag) for part in parts),
        )
        root = _root(answer, "CompleteMultipartUploadResult", client, doing)
    except RefusedError as error:
        raise _gone(error) from error
    if not gcs_xml.text(root, "ETag"):
        raise lacking("the ETag of a completed object", client.endpoint, "XML")
    _check_key(root, requests, upload.name, client)
    return Completed(answer.headers.get("x-goog-generation"), crc32c_of(answer.headers))


def abort(requests: Requests, client: Client, upload: Upload) -> bool:
    """Abort an upload; return False where there was none."""
    try:
        answer = client.request(
            "abort a multipart upload",
            "DELETE",
            object_path(requests, upload.name),
            parameters={"uploadId": upload.upload_id},
            headers=client.payer,
            body=b"",
        )
    except RefusedError as error:
        if is_gone(error):
            return False
        raise
    answer.drain_conn()
    answer.release_conn()
    return True


def listed(requests: Requests, client: Client, prefix: str, following: Mapping[str, str]) -> Page:
    """Return a page of the pending uploads whose names begin with a prefix."""
    doing = "list multipart uploads"
    answer = client.request(
        doing,
        "GET",
        _bucket_path(requests),
        parameters={"uploads": "", "prefix": requests.prefix + prefix, **following},
        headers=client.payer,
    )
    root = _root(answer, "ListMultipartUploadsResult", client, doing, _MOST_OF_A_PAGE)
    if not gcs_xml.text(root, "Bucket"):
        raise lacking("the bucket of a listing", client.endpoint, "XML")
    markers = {
        "key-marker": gcs_xml.text(root, "NextKeyMarker"),
        "upload-id-marker": gcs_xml.text(root, "NextUploadIdMarker"),
    }
    truncated = gcs_xml.text(root, "IsTruncated").strip().lower() == "true"
    return Page(
        [_pending(requests, client, element, prefix) for element in gcs_xml.children(root, "Upload")],
        {name: value for name, value in markers.items() if value and truncated},
        truncated,
    )


def is_gone(error: Exception | None) -> bool:
    """Return True for an answer that there is no such upload."""
    if isinstance(error, RefusedError):
        return error.status == HTTPStatus.NOT_FOUND and error.reason != _NO_BUCKET
    return isinstance(error, GoneError)


def is_unsupported(error: Exception) -> bool:
    """Return True for the answer of a server that has no multipart uploads.

    Raises:
        Exception: the request failed for another reason, such as credentials.
    """
    if isinstance(error, PageError | StorageError):  # the answer is no document of GCS
        return True
    if not isinstance(error, RefusedError) or error.status not in _NO_MULTIPART:
        raise error
    if error.reason in _OF_THE_BUCKET:
        raise error
    return True


def _gone(error: RefusedError) -> Exception:
    """Return the error for a refusal of a part or a completion."""
    if not is_gone(error):
        return error
    return GoneError("the upload does not exist: it was completed or aborted")


def _bucket_path(requests: Requests) -> str:
    return f"/{quote(requests.bucket, safe='')}"


def _check_key(root: ET.Element, requests: Requests, name: str, client: Client) -> None:
    """Check that an answer is about the object that was asked for, where it names one."""
    key, full = gcs_xml.text(root, "Key"), requests.prefix + name
    if key and full not in (key, unquote(key)):
        raise lacking(f"the object {full!r}", client.endpoint, "XML")


def _pending(requests: Requests, client: Client, element: ET.Element, prefix: str) -> PendingUpload:
    key, upload_id = gcs_xml.text(element, "Key"), gcs_xml.text(element, "UploadId").strip()
    if not upload_id or not key.startswith(requests.prefix + prefix):
        raise lacking(f"an upload whose name begins with {prefix!r}", client.endpoint, "XML")
    name = key.removeprefix(requests.prefix)
    started = gcs_xml.text(element, "Initiated").strip()
    try:
        since = datetime.fromisoformat(started) if started else None
    except ValueError:
        since = None
    return PendingUpload(Upload(name, upload_id), since)


def _read(answer: urllib3.BaseHTTPResponse, most: int) -> bytes:
    """Return the body of an answer, or so many bytes of it.

    Raises:
        HTTPError: the body ends before its length. A single read does not report that.
    """
    data = b""
    while len(data) < most and (piece := answer.read(most - len(data))):
        data += piece
    return data


def _root(
    answer: urllib3.BaseHTTPResponse,
    expected: str,
    client: Client,
    doing: str,
    most: int = _MOST_OF_AN_ANSWER,
) -> ET.Element:
    """Return the root of an answer's document, whose name is ``expected``.

    Raises:
        RefusedError: the document is an error, as may come with status 200 where the server was slow.
        StorageError: the answer is another document, or is longer than ``most`` bytes.
    """
    data = _read(answer, most + 1)
    if len(data) > most:
        answer.close()
        raise lacking(f"an end within {most:,} bytes", client.endpoint, "XML")
    answer.release_conn()
    if (error := gcs_xml.error_of(data)) is not None:
        status = _STATUS_OF_CODES.get(error[0], HTTPStatus.INTERNAL_SERVER_ERROR)
        raise RefusedError(doing, int(status), data, answer.headers.get("Retry-After"))
    root = gcs_xml.parsed(data)
    if root is None or gcs_xml.name_of(root) != expected:
        raise lacking(f"a document {expected}", client.endpoint, "XML")
    return root
