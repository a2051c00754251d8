"""Copies that an S3 server makes itself: no byte comes here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from botocore.exceptions import ClientError

from cloudckpt.backends.checksums import ALGORITHMS
from cloudckpt.backends.stores.base import ObjectInfo, ObjectStore, Part, Upload
from cloudckpt.backends.stores.retry import Outcome
from cloudckpt.backends.stores.s3.capabilities import TagForm
from cloudckpt.backends.stores.s3.client import Clients
from cloudckpt.backends.stores.s3.errors import not_s3, status_of
from cloudckpt.backends.stores.s3.requests import Requests

LARGEST: Final = 5 << 30
"""Bytes that CopyObject takes."""
_PART: Final = 1 << 30
"""Bytes of a part beyond that: an answer comes when all of them are copied."""


@dataclass(frozen=True, slots=True)
class Original:
    """The object that is copied."""

    info: ObjectInfo
    bucket: str
    key: str
    form: TagForm | None = TagForm.QUOTED
    """The form in which the server takes the version as a condition; None where it takes it in none."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments that name it in a request."""
        named: dict[str, Any] = {"CopySource": {"Bucket": self.bucket, "Key": self.key}}
        if self.form is None or not self.info.version:
            return named
        return named | {"CopySourceIfMatch": self.form.of(self.info.version)}


class Copying:
    """Copies into one object of a store, whose arguments ``own`` gives, by method.

    A server that refuses is one that can't: it may lack the request, or these credentials the right to read
    the original through the other bucket. The caller has other ways, and gets the error there.
    """

    def __init__(self, store: ObjectStore, requests: Requests, own: Callable[..., dict[str, Any]]) -> None:
        self._store = store
        self._requests = requests
        self._own = own

    def of(self, original: Original) -> ObjectInfo | None:
        """Copy all of an object; None where the server would not."""
        name = original.info.name
        if original.info.size <= LARGEST:
            return self._store.stat(name) if self._at_once(original) else None
        upload = self._store.begin_upload(name)
        try:
            parts = self._parts(original, upload)
            if parts is not None:
                return self._store.complete_upload(upload, parts)
        except BaseException:
            self._store.abort_upload(upload)
            raise
        self._store.abort_upload(upload)
        return None

    def _at_once(self, original: Original) -> bool:
        def copy(clients: Clients) -> None:
            answer = clients.patient.copy_object(**self._own(clients, "copy_object", **original.arguments))
            if not answer.get("CopyObjectResult", {}).get("ETag"):
                raise not_s3(clients.route, answer, "CopyObject without an ETag")

        outcome = self._requests.outcome(copy, patient=True)
        return not _is_refused(outcome) and outcome.result() is None

    def _parts(self, original: Original, upload: Upload) -> list[Part] | None:
        parts: list[Part] = []
        for number, (start, stop) in enumerate(_ranges(original.info.size), 1):
            own = {
                "UploadId": upload.upload_id,
                "PartNumber": number,
                "CopySourceRange": f"bytes={start}-{stop - 1}",
                **original.arguments,
            }
            outcome = self._requests.outcome(self._part(own, stop - start), patient=True)
            if _is_refused(outcome):
                return None
            parts.append(outcome.result())
        return parts

    def _part(self, own: dict[str, Any], size: int) -> Callable[[Clients], Part]:
        def copy(clients: Clients) -> Part:
            answer = clients.patient.upload_part_copy(**self._own(clients, "upload_part_copy", **own))
            result: dict[str, Any] = answer.get("CopyPartResult") or {}
            if "ETag" not in result:
                raise not_s3(clients.route, answer, "UploadPartCopy without an ETag")
            found = ((name, result.get(f"Checksum{name.upper()}")) for name in ALGORITHMS)
            checksum = next((f"{name}:{value}" for name, value in found if value), None)
            return Part(own["PartNumber"], size, result["ETag"], checksum)

        return copy


def _ranges(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(size, start + _PART)) for start in range(0, size, _PART))


def _is_refused(outcome: Outcome[Any]) -> bool:
    error = outcome.error
    if not isinstance(error, ClientError):
        return False
    status = status_of(error)
    return status < HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.NOT_IMPLEMENTED
