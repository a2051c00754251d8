"""Multipart uploads of Google Cloud Storage's XML API, in memory.

The rules are those of Google's reference: "XML API multipart uploads" and "Quotas & limits".
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from support.gcs_objects import Conditions, Content, Json, Refusal, Stored, Sums, check_name
from support.gcs_state import Cloud

LEAST_PART = 5 << 20
"""Bytes of every part but the last of an object."""
MOST_PARTS = 10_000
_MOST_LISTED = 1000


@dataclass(frozen=True, slots=True)
class StoredPart:
    content: Content
    etag: str
    """Quoted."""


@dataclass(slots=True)
class MultipartUpload:
    bucket: str
    name: str
    fields: Json
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    parts: dict[int, StoredPart] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Bytes of the parts so far."""
        return sum(part.content.size for part in self.parts.values())


@dataclass(frozen=True, slots=True)
class Page:
    uploads: Sequence[MultipartUpload]
    truncated: bool


class MultipartUploads:
    """All pending uploads, for any number of threads."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._lock = threading.Lock()
        self._open: dict[str, MultipartUpload] = {}

    def begin(self, upload: MultipartUpload) -> str:
        """Open an upload and return its ID."""
        self._cloud.bucket(upload.bucket)
        check_name(upload.name)
        with self._lock:
            self._open[upload.identity] = upload
        return upload.identity

    def put_part(
        self, bucket: str, name: str, identity: str, number: int, body: memoryview, *, sums: Sums
    ) -> StoredPart:
        """Keep a part, in the place of the one of that number."""
        self._found(bucket, name, identity)
        if not 1 <= number <= MOST_PARTS:
            message = f"Part number must be an integer between 1 and {MOST_PARTS}, inclusive."
            raise Refusal(400, "InvalidArgument", message)
        content = Content([body] if len(body) else [])
        for kind, expected in sums:
            found = content.crc32c if kind == "crc32c" else content.md5
            if found != expected:
                message = f"The {kind} you specified in x-goog-hash did not match what we computed: {found}."
                raise Refusal(400, "BadDigest", message)
        part = StoredPart(content, f'"{uuid.uuid4().hex}"')
        with self._lock:
            self._found_now(bucket, name, identity).parts[number] = part
        return part

    def complete(self, bucket: str, name: str, identity: str, listed: Sequence[tuple[int, str]]) -> Stored:
        """Make an object of parts, given by number and entity tag; other parts are dropped."""
        with self._lock:
            upload = self._found_now(bucket, name, identity)
            if not listed:
                raise Refusal(400, "MalformedCompleteMultipartUploadRequest", "You must specify a part.")
            numbers = [number for number, _ in listed]
            if numbers != sorted(set(numbers)):
                raise Refusal(400, "InvalidPartOrder", "The list of parts was not in ascending order.")
            found = [
                part for number, etag in listed if (part := upload.parts.get(number)) and part.etag == etag
            ]
            if len(found) < len(listed):
                raise Refusal(400, "InvalidPart", "One or more of the specified parts could not be found.")
            if any(part.content.size < LEAST_PART for part in found[:-1]):
                message = "Your proposed upload is smaller than the minimum allowed object size."
                raise Refusal(400, "EntityTooSmall", message)
            content = Content([piece for part in found for piece in part.content.pieces])
            stored = self._cloud.put(
                bucket, name, content, upload.fields, conditions=Conditions(), in_parts=True
            )
            del self._open[identity]
            return stored

    def abort(self, bucket: str, name: str, identity: str) -> None:
        """Forget an upload and its parts."""
        with self._lock:
            self._found_now(bucket, name, identity)
            del self._open[identity]

    def list(self, bucket: str, prefix: str, key_marker: str, id_marker: str, most: int) -> Page:
        """Return uploads in the order of their names, those after the markers."""
        self._cloud.bucket(bucket)
        with self._lock:
            every = sorted(self._open.values(), key=lambda one: (one.name, one.identity))
        found = [one for one in every if one.bucket == bucket and one.name.startswith(prefix)]
        if key_marker:
            found = [
                one
                for one in found
                if one.name > key_marker or (id_marker and (one.name, one.identity) > (key_marker, id_marker))
            ]
        limit = min(most, self._cloud.page_size, _MOST_LISTED)
        return Page(found[:limit], len(found) > limit)

    def pending(self) -> Sequence[MultipartUpload]:
        """Return all that are open."""
        with self._lock:
            return [*self._open.values()]

    def _found(self, bucket: str, name: str, identity: str) -> MultipartUpload:
        with self._lock:
            return self._found_now(bucket, name, identity)

    def _found_now(self, bucket: str, name: str, identity: str) -> MultipartUpload:
        self._cloud.bucket(bucket)
        upload = self._open.get(identity)
        if upload is None or (upload.bucket, upload.name) != (bucket, name):
            raise Refusal(404, "NoSuchUpload", "The requested upload was not found.")
        return upload
