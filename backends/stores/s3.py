"""Objects in an S3 bucket, or on a server that speaks S3's protocol."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from http import HTTPStatus
from typing import Any

from botocore.exceptions import ClientError

from cloudckpt.backends.checksum import CRC64NVME
from cloudckpt.backends.errors import (
    AccessDeniedError,
    ConfigurationError,
    IntegrityError,
    ObjectNotFoundError,
    StorageError,
    UnansweredError,
)
from cloudckpt.backends.store import (
    Arrived,
    Capabilities,
    Condition,
    Create,
    Departed,
    Listing,
    ObjectInfo,
    ObjectStore,
    Overwrite,
    Part,
    PartLimits,
    PendingUpload,
    Update,
    Upload,
)
from cloudckpt.backends.stores.retry import Outcome
from cloudckpt.backends.stores.s3_body import BuffersBody
from cloudckpt.backends.stores.s3_checksum import contradicted, given_or_of, parameters
from cloudckpt.backends.stores.s3_client import Clients
from cloudckpt.backends.stores.s3_copy import Copying, Original
from cloudckpt.backends.stores.s3_errors import NotDeletedError, code_of, is_of_credentials, not_s3, status_of
from cloudckpt.backends.stores.s3_missing import read_object
from cloudckpt.backends.stores.s3_probe import Honoured, what_is_honoured
from cloudckpt.backends.stores.s3_read import read_range, read_whole
from cloudckpt.backends.stores.s3_requests import Requests
from cloudckpt.backends.target import Target

_DELETED_AT_ONCE = 1000
_MIN_PART = 5 << 20
_MAX_PART = 5 << 30
_MAX_PARTS = 10_000

_log = logging.getLogger(__name__)


class S3Store(ObjectStore):
    """Objects below ``s3://bucket/prefix``.

    A put with a condition is repeated when its answer is lost, like any request. So a
    ``PreconditionFailedError`` may mean that an earlier try of this very put won: the caller tells by what it
    finds in the object.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._bucket = target.bucket
        self._prefix = f"{target.path}/" if target.path else ""
        self._requests = Requests(target)
        self._refuses_checksums = False

    def __reduce__(self) -> tuple[type[S3Store], tuple[Target]]:
        return type(self), (self._target,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    @property
    def uri(self) -> str:
        return self._target.uri

    @property
    def part_limits(self) -> PartLimits:
        return PartLimits(_MIN_PART, _MAX_PART, _MAX_PARTS, in_place=True)

    @property
    def part_checksum(self) -> str | None:
        """As the option says; ``auto`` asks a server other than AWS itself whether it would look at one."""
        option = self._target.options.checksum
        if option != "auto":
            return None if option == "none" else option
        if self._refuses_checksums or not self._honoured.checksum:
            return None
        return CRC64NVME.name

    @property
    def capabilities(self) -> Capabilities:
        """What the server honours; asking a server other than AWS itself makes a few requests, once."""
        honoured = self._honoured
        return Capabilities(
            conditional_create=honoured.create,
            conditional_update=honoured.update,
        )

    @property
    def _honoured(self) -> Honoured:
        with self._requests.explained():
            return what_is_honoured(self._requests, self._bucket, self._prefix)

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        conditional = self._condition(name, condition)

        def send(clients: Clients) -> str:
            arguments = self._of(clients, "put_object", name, Body=data, **conditional)
            return _version(clients.data.put_object(**arguments), clients)

        with self._requests.explained(name):
            outcome = self._requests.outcome(send)
            # A precondition that failed is an answer for every try: none can succeed any more.
            if not _is_refused_condition(outcome.error):
                _check_answered(outcome, "put")
            return ObjectInfo(name, len(data), outcome.result())

    def get(self, name: str) -> tuple[bytes, ObjectInfo]:
        def read(clients: Clients) -> tuple[bytes, ObjectInfo]:
            data, answer = read_whole(clients, self._of(clients, "get_object", name))
            return data, ObjectInfo(name, len(data), _version(answer, clients), answer.get("LastModified"))

        return read_object(self._requests, self._target, name, read)

    def read_into(
        self,
        name: str,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        arrived: Arrived | None = None,
    ) -> int | None:
        def read(clients: Clients) -> int | None:
            return read_range(clients, self._of(clients, "get_object", name), offset, buffers, arrived)

        return read_object(self._requests, self._target, name, read, nbytes=sum(b.nbytes for b in buffers))

    def stat(self, name: str) -> ObjectInfo:
        def head(clients: Clients) -> ObjectInfo:
            answer = clients.data.head_object(**self._of(clients, "head_object", name))
            version = _version(answer, clients)
            return ObjectInfo(name, answer["ContentLength"], version, answer.get("LastModified"))

        return read_object(self._requests, self._target, name, head)

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        objects: list[ObjectInfo] = []
        prefixes: list[str] = []
        arguments: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        if delimiter:
            arguments["Delimiter"] = "/"
        for page in self._pages("list_objects_v2", arguments, {"ContinuationToken": "NextContinuationToken"}):
            for item in page.get("Contents", ()):
                name = item["Key"].removeprefix(self._prefix)
                # A key that ends in a slash is the folder that a web console shows, not an object of ours.
                if name and not name.endswith("/"):
                    etag = item["ETag"].strip('"')
                    objects.append(ObjectInfo(name, item["Size"], etag, item.get("LastModified")))
            prefixes += [item["Prefix"].removeprefix(self._prefix) for item in page.get("CommonPrefixes", ())]
        return Listing(tuple(sorted(objects, key=lambda info: info.name)), tuple(sorted(prefixes)))

    def delete(self, names: Iterable[str]) -> None:
        remaining = iter(names)
        while batch := list(itertools.islice(remaining, _DELETED_AT_ONCE)):
            self._requests.ask(self._deletion(batch))

    def _deletion(self, names: Sequence[str]) -> Callable[[Clients], None]:
        keys = [{"Key": self._prefix + name} for name in names]

        def delete(clients: Clients) -> None:
            answer = clients.fs.call_s3(
                "delete_objects", Bucket=self._bucket, Delete={"Objects": keys, "Quiet": True}
            )
            if failures := answer.get("Errors"):
                raise self._not_deleted(failures)

        return delete

    def begin_upload(self, name: str) -> Upload:
        with self._requests.explained(name):
            declared = self._declaration()  # other threads may learn meanwhile that the server refuses it
            outcome = self._begin(name, declared)
            lost = outcome.lost
            if declared and self._may_do_without_checksum(outcome.error):
                outcome = self._begin(name, {})
                self._refuses_checksums |= outcome.error is None
            upload = Upload(name, outcome.result())
        if lost or outcome.lost:
            self._abort_others(upload)
        return upload

    def _begin(self, name: str, declared: dict[str, str]) -> Outcome[str]:
        def begin(clients: Clients) -> str:
            arguments = self._of(clients, "create_multipart_upload", name, **declared)
            answer = clients.data.create_multipart_upload(**arguments)
            if "UploadId" not in answer:
                raise not_s3(clients.endpoint)
            return str(answer["UploadId"])

        return self._requests.outcome(begin)

    def _abort_others(self, ours: Upload) -> None:
        """Abort what else is pending under the name: a try began it whose answer was lost."""
        try:
            for pending in list(self.pending_uploads(ours.name)):
                if pending.upload.name == ours.name and pending.upload != ours:
                    self.abort_upload(pending.upload)
        except StorageError as error:
            _log.warning("an upload may have been begun twice, and gc will abort the other: %s", error)

    def upload_part(
        self,
        upload: Upload,
        number: int,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        checksum: str | None = None,
        departed: Departed | None = None,
    ) -> Part:
        del offset  # S3 goes by the number
        wanted = self.part_checksum
        checksum = given_or_of(wanted, checksum, buffers) if wanted else None

        def send(clients: Clients) -> Part:
            body = BuffersBody(buffers, departed)
            own = {"UploadId": upload.upload_id, "PartNumber": number, "Body": body, **parameters(checksum)}
            answer = clients.data.upload_part(**self._of(clients, "upload_part", upload.name, **own))
            if "ETag" not in answer:
                raise not_s3(clients.endpoint)
            return Part(number, len(body), answer["ETag"], checksum)

        return self._requests.ask(send, upload.name, nbytes=sum(buffer.nbytes for buffer in buffers))

    def complete_upload(self, upload: Upload, parts: Sequence[Part], *, confirm: bool = True) -> ObjectInfo:
        listed = [
            {"PartNumber": part.number, "ETag": part.etag, **parameters(part.checksum)}
            for part in sorted(parts, key=lambda part: part.number)
        ]
        own = {"UploadId": upload.upload_id, "MultipartUpload": {"Parts": listed}}

        def complete(clients: Clients) -> dict[str, Any]:
            arguments = self._of(clients, "complete_multipart_upload", upload.name, **own)
            return clients.completion(**arguments)

        size = sum(part.size for part in parts)
        with self._requests.explained(upload.name):
            outcome = self._requests.outcome(complete, patient=True, on_behalf=True)
            # An earlier try may have been carried out, and the upload have ended with it.
            ended = outcome.attempts > 1 and _is_gone(outcome.error)
            if not ended:
                _check_answered(outcome, "completion")
            if not ended or not self._has_size(upload.name, size):
                answer = outcome.result()
                self._check(upload.name, contradicted(answer, parts))
                if not confirm:
                    return ObjectInfo(upload.name, size, str(answer.get("ETag", "")).strip('"') or None)
        info = self.stat(upload.name)
        if info.size != size:
            wrong = f"the completed object has {info.size:,} bytes where its parts have {size:,}"
            self._check(upload.name, wrong)
        return info

    def _has_size(self, name: str, size: int) -> bool:
        try:
            return self.stat(name).size == size
        except ObjectNotFoundError:
            return False

    def _check(self, name: str, wrong: str | None) -> None:
        """Delete a completed object with which something is wrong, and say what."""
        if wrong is not None:
            self.delete([name])
            raise IntegrityError(wrong, uri=self.uri, object_name=name)

    def abort_upload(self, upload: Upload) -> None:
        def abort(clients: Clients) -> None:
            own = {"UploadId": upload.upload_id}
            arguments = self._of(clients, "abort_multipart_upload", upload.name, **own)
            clients.data.abort_multipart_upload(**arguments)

        with self._requests.explained(upload.name):
            outcome = self._requests.outcome(abort)
            if not _is_gone(outcome.error):
                outcome.result()

    def pending_uploads(self, prefix: str = "") -> Iterator[PendingUpload]:
        arguments = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        tokens = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        for page in self._pages("list_multipart_uploads", arguments, tokens):
            for item in page.get("Uploads", ()):
                upload = Upload(item["Key"].removeprefix(self._prefix), item["UploadId"])
                yield PendingUpload(upload, item.get("Initiated"))

    def copy_from(self, source: ObjectStore, info: ObjectInfo) -> ObjectInfo | None:
        """By CopyObject, and part by part beyond what that takes."""
        if not isinstance(source, S3Store):
            return None
        theirs = source._target  # noqa: SLF001 - of this class
        if not self._target.options.reaches_as(theirs.options):
            return None
        original = Original(info, theirs.bucket, f"{theirs.path}/{info.name}".lstrip("/"))
        with self._requests.explained(info.name):
            return Copying(self, self._requests, functools.partial(self._of, name=info.name)).of(original)

    def close(self) -> None:
        self._requests.close()

    def _of(self, clients: Clients, method: str, name: str, **own: Any) -> dict[str, Any]:
        """Return the arguments of a method that concerns one object."""
        return clients.arguments(method, Bucket=self._bucket, Key=self._prefix + name, **own)

    def _condition(self, name: str, condition: Condition) -> dict[str, str]:
        match condition:
            case Overwrite():
                return {}
            case Create():
                honoured, parameter = self.capabilities.conditional_create, {"IfNoneMatch": "*"}
            case Update(version):
                honoured, parameter = self.capabilities.conditional_update, {"IfMatch": f'"{version}"'}
        if not honoured:
            raise ConfigurationError(
                "the server ignores the condition of a put", uri=self.uri, object_name=name
            )
        return parameter

    def _declaration(self) -> dict[str, str]:
        return {"ChecksumAlgorithm": wanted.upper()} if (wanted := self.part_checksum) else {}

    def _may_do_without_checksum(self, error: Exception | None) -> bool:
        if self._target.options.checksum != "auto" or not isinstance(error, ClientError):
            return False
        refused = status_of(error) in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_IMPLEMENTED)
        return refused and not is_of_credentials(error)

    def _pages(
        self, method: str, arguments: dict[str, Any], tokens: dict[str, str]
    ) -> Iterator[dict[str, Any]]:
        """Yield the pages of a listing, where ``tokens`` says which fields of a page ask for the next."""
        following: dict[str, str] = {}
        while True:
            page = self._requests.ask(functools.partial(_page, method, {**arguments, **following}))
            yield page
            before = following
            following = {token: page[field] for token, field in tokens.items() if page.get(field)}
            if not page.get("IsTruncated"):
                return
            if following in ({}, before):
                raise StorageError("the server's listing does not go on where it says it would", uri=self.uri)

    def _not_deleted(self, failures: Sequence[dict[str, Any]]) -> StorageError:
        first = failures[0]
        code, key = first.get("Code", "no code"), str(first.get("Key", ""))
        denied = code in ("AccessDenied", "AllAccessDisabled")
        error = (AccessDeniedError if denied else NotDeletedError)(
            f"{len(failures):,} objects were not deleted ({code})",
            object_name=key.removeprefix(self._prefix),
            hint="The credentials need s3:DeleteObject here" if denied else None,
        )
        if isinstance(error, NotDeletedError):
            error.code = code
        return error


def _version(answer: dict[str, Any], clients: Clients) -> str:
    """Return the entity tag without its quotes, which servers put in some answers and leave out of others."""
    if "ETag" not in answer:
        raise not_s3(clients.endpoint)
    return str(answer["ETag"]).strip('"')


def _page(method: str, arguments: dict[str, Any], clients: Clients) -> dict[str, Any]:
    page: dict[str, Any] = clients.fs.call_s3(method, **arguments)
    if "Name" not in page and "Bucket" not in page:
        raise not_s3(clients.endpoint)
    return page


def _check_answered(outcome: Outcome[Any], what: str) -> None:
    """Refuse to call a request failed that may have been carried out, or still be."""
    if outcome.error is not None and outcome.lost:
        tries = "its one try" if outcome.attempts == 1 else f"one of {outcome.attempts} tries"
        raise UnansweredError(f"the {what} went out, and the answer to {tries} was lost") from outcome.error


def _is_refused_condition(error: Exception | None) -> bool:
    return isinstance(error, ClientError) and status_of(error) == HTTPStatus.PRECONDITION_FAILED


def _is_gone(error: Exception | None) -> bool:
    return isinstance(error, ClientError) and code_of(error) == "NoSuchUpload"
