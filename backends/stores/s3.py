"""Objects in an S3 bucket, or on a server that speaks S3's protocol."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from http import HTTPStatus
from typing import Any

import tenacity
from botocore.exceptions import BotoCoreError, ClientError

from cloudckpt.backends.errors import (
    AccessDeniedError,
    ConfigurationError,
    IntegrityError,
    StorageError,
    UnansweredError,
)
from cloudckpt.backends.store import (
    Capabilities,
    Condition,
    Create,
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
from cloudckpt.backends.stores.s3_body import BuffersBody
from cloudckpt.backends.stores.s3_checksum import PartChecksum, parameters
from cloudckpt.backends.stores.s3_client import Clients, LazyClients
from cloudckpt.backends.stores.s3_errors import code_of, explained, not_s3, status_of
from cloudckpt.backends.stores.s3_lost import lost_answers
from cloudckpt.backends.stores.s3_probe import PROBE_NAME, conditions_honoured
from cloudckpt.backends.stores.s3_read import read_range, read_whole
from cloudckpt.backends.target import Target

_DELETED_AT_ONCE = 1000
_MIN_PART = 5 << 20
_MAX_PART = 5 << 30
_MAX_PARTS = 10_000
_CONFLICTS = 4


class S3Store(ObjectStore):
    """Objects below ``s3://bucket/prefix``.

    A put with a condition is repeated when its answer is lost, like any request. So a
    ``PreconditionFailedError`` may mean that the first try of this very put won: the caller tells by what it
    finds in the object.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._bucket = target.bucket
        self._prefix = f"{target.path}/" if target.path else ""
        self._lazy = LazyClients(target)
        self._checksum = PartChecksum.chosen(target.options.checksum)

    def __reduce__(self) -> tuple[type[S3Store], tuple[Target]]:
        return type(self), (self._target,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    @property
    def uri(self) -> str:
        return self._target.uri

    @property
    def part_limits(self) -> PartLimits:
        return PartLimits(_MIN_PART, _MAX_PART, _MAX_PARTS)

    @property
    def capabilities(self) -> Capabilities:
        """What the server honours; asking a server other than AWS itself makes a few requests, once."""
        with self._asking() as clients:
            honoured = conditions_honoured(clients, self._bucket, self._prefix)
        return Capabilities(
            conditional_create=honoured.create,
            conditional_update=honoured.update,
        )

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        conditional = self._condition(name, condition)
        with self._asking(name) as clients, lost_answers() as lost:
            arguments = self._of(clients, "put_object", name, Body=data, **conditional)
            try:
                answer = _past_conflicts()(clients.data.put_object, **arguments)
            except (ClientError, BotoCoreError) as error:
                # A precondition that failed is an answer for every try: none can succeed any more.
                if not _is_refused_condition(error) and (lost() or _is_from_a_gateway(error)):
                    raise UnansweredError("a try of the put went out and its answer was lost") from error
                raise
            etag = _version(answer, clients)
        return ObjectInfo(name, len(data), etag)

    def get(self, name: str) -> tuple[bytes, ObjectInfo]:
        with self._asking(name) as clients:
            data, answer = read_whole(clients, self._of(clients, "get_object", name), self._attempts)
        return data, ObjectInfo(name, len(data), _version(answer, clients), answer.get("LastModified"))

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> int | None:
        with self._asking(name) as clients:
            return read_range(clients, self._of(clients, "get_object", name), self._attempts, offset, buffers)

    def stat(self, name: str) -> ObjectInfo:
        with self._asking(name) as clients:
            answer = clients.data.head_object(**self._of(clients, "head_object", name))
            etag = _version(answer, clients)
        return ObjectInfo(name, answer["ContentLength"], etag, answer.get("LastModified"))

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
                if name and not name.endswith("/") and not name.rpartition("/")[2].startswith(PROBE_NAME):
                    etag = item["ETag"].strip('"')
                    objects.append(ObjectInfo(name, item["Size"], etag, item.get("LastModified")))
            prefixes += [item["Prefix"].removeprefix(self._prefix) for item in page.get("CommonPrefixes", ())]
        return Listing(tuple(sorted(objects, key=lambda info: info.name)), tuple(sorted(prefixes)))

    def delete(self, names: Iterable[str]) -> None:
        remaining = iter(names)
        while batch := list(itertools.islice(remaining, _DELETED_AT_ONCE)):
            keys = [{"Key": self._prefix + name} for name in batch]
            with self._asking() as clients:
                answer = clients.fs.call_s3(
                    "delete_objects", Bucket=self._bucket, Delete={"Objects": keys, "Quiet": True}
                )
                if failures := answer.get("Errors"):
                    raise self._not_deleted(failures)

    def begin_upload(self, name: str) -> Upload:
        with self._asking(name) as clients:
            arguments = self._of(clients, "create_multipart_upload", name)
            declared = self._declaration()  # other threads may learn meanwhile that the server refuses it
            try:
                answer = clients.data.create_multipart_upload(**arguments, **declared)
            except ClientError as error:
                if not declared or not self._may_do_without_checksum(error):
                    raise
                answer = clients.data.create_multipart_upload(**arguments)
                self._checksum = None
            if "UploadId" not in answer:
                raise not_s3(clients.endpoint)
        return Upload(name, answer["UploadId"])

    def upload_part(
        self,
        upload: Upload,
        number: int,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        checksum: str | None = None,
    ) -> Part:
        del offset  # S3 goes by the number
        checksum = self._checksum.given_or_of(checksum, buffers) if self._checksum else None
        body = BuffersBody(buffers)
        arguments = {"UploadId": upload.upload_id, "PartNumber": number, "Body": body, **parameters(checksum)}
        with self._asking(upload.name) as clients:
            answer = clients.data.upload_part(**self._of(clients, "upload_part", upload.name, **arguments))
            if "ETag" not in answer:
                raise not_s3(clients.endpoint)
        return Part(number, len(body), answer["ETag"], checksum)

    def complete_upload(self, upload: Upload, parts: Sequence[Part]) -> ObjectInfo:
        listed = [
            {"PartNumber": part.number, "ETag": part.etag, **parameters(part.checksum)}
            for part in sorted(parts, key=lambda part: part.number)
        ]
        size = sum(part.size for part in parts)
        with self._asking(upload.name) as clients:
            arguments = self._of(clients, "complete_multipart_upload", upload.name, UploadId=upload.upload_id)
            arguments["MultipartUpload"] = {"Parts": listed}
            calling = _past_conflicts()
            try:
                calling(clients.patient.complete_multipart_upload, **arguments)
            except ClientError as error:
                # The answer to an earlier try may have been lost, and the upload have ended with it.
                repeated = calling.statistics["attempt_number"] > 1 or _was_repeated(error)
                if code_of(error) != "NoSuchUpload" or not repeated:
                    raise
                if self.stat(upload.name).size != size:
                    raise
        info = self.stat(upload.name)
        if info.size != size:
            self.delete([upload.name])
            message = f"the completed object has {info.size:,} bytes where its parts have {size:,}"
            raise IntegrityError(message, uri=self.uri, object_name=upload.name)
        return info

    def abort_upload(self, upload: Upload) -> None:
        with self._asking(upload.name) as clients:
            arguments = self._of(clients, "abort_multipart_upload", upload.name, UploadId=upload.upload_id)
            try:
                clients.data.abort_multipart_upload(**arguments)
            except ClientError as error:
                if code_of(error) != "NoSuchUpload":
                    raise

    def pending_uploads(self, prefix: str = "") -> Iterator[PendingUpload]:
        arguments = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        tokens = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        for page in self._pages("list_multipart_uploads", arguments, tokens):
            for item in page.get("Uploads", ()):
                upload = Upload(item["Key"].removeprefix(self._prefix), item["UploadId"])
                yield PendingUpload(upload, item.get("Initiated"))

    def close(self) -> None:
        self._lazy.close()

    @property
    def _attempts(self) -> int:
        return self._target.options.retries + 1

    @contextlib.contextmanager
    def _asking(self, name: str | None = None) -> Iterator[Clients]:
        """Lend the clients to the block, and explain what goes wrong in it."""
        with explained(self._target, self._target.options.endpoint_url or "S3", name):
            clients = self._lazy.get()
        with explained(self._target, clients.endpoint, name):
            yield clients

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
        return self._checksum.declaration if self._checksum else {}

    def _may_do_without_checksum(self, error: ClientError) -> bool:
        chosen_here = self._target.options.checksum == "auto"
        return chosen_here and status_of(error) in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_IMPLEMENTED)

    def _pages(
        self, method: str, arguments: dict[str, Any], tokens: dict[str, str]
    ) -> Iterator[dict[str, Any]]:
        """Yield the pages of a listing, where ``tokens`` says which fields of a page ask for the next."""
        following: dict[str, str] = {}
        while True:
            with self._asking() as clients:
                page: dict[str, Any] = clients.fs.call_s3(method, **arguments, **following)
                if "Name" not in page and "Bucket" not in page:
                    raise not_s3(clients.endpoint)
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
        return (AccessDeniedError if denied else StorageError)(
            f"{len(failures):,} objects were not deleted ({code})",
            object_name=key.removeprefix(self._prefix),
            hint="The credentials need s3:DeleteObject here" if denied else None,
        )


def _version(answer: dict[str, Any], clients: Clients) -> str:
    """Return the entity tag without its quotes, which servers put in some answers and leave out of others."""
    if "ETag" not in answer:
        raise not_s3(clients.endpoint)
    return str(answer["ETag"]).strip('"')


def _is_refused_condition(error: Exception) -> bool:
    return isinstance(error, ClientError) and status_of(error) == HTTPStatus.PRECONDITION_FAILED


def _is_from_a_gateway(error: Exception) -> bool:
    """Tell the answers of something in between, behind which the server may still be at work."""
    gateway = (HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT)
    return isinstance(error, ClientError) and status_of(error) in gateway


def _past_conflicts() -> tenacity.Retrying:
    """Call again while S3 answers that another conditional write is under way."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_conflict),
        stop=tenacity.stop_after_attempt(_CONFLICTS),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=2.0),
        reraise=True,
    )


def _is_conflict(error: BaseException) -> bool:
    return isinstance(error, ClientError) and status_of(error) == HTTPStatus.CONFLICT


def _was_repeated(error: ClientError) -> bool:
    return int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)) > 0
