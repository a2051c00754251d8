"""Objects in an S3 bucket, or on a server that speaks S3's protocol."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from http import HTTPStatus
from typing import Any

from botocore.exceptions import ClientError

from cloudckpt.backends.checksums import CRC64NVME
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import (
    ConfigurationError,
    IntegrityError,
    ObjectNotFoundError,
)
from cloudckpt.backends.stores.base import (
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
from cloudckpt.backends.stores.http.request_body import BuffersBody
from cloudckpt.backends.stores.lost_begins import abort_others
from cloudckpt.backends.stores.retry import Outcome
from cloudckpt.backends.stores.s3.answers import check_key
from cloudckpt.backends.stores.s3.capabilities import PutSupport, server_of
from cloudckpt.backends.stores.s3.checksums import content_md5, contradicted, given_or_of, parameters, proves
from cloudckpt.backends.stores.s3.client import Clients
from cloudckpt.backends.stores.s3.copy import Copying, Original
from cloudckpt.backends.stores.s3.delete import Deleter
from cloudckpt.backends.stores.s3.errors import (
    code_of,
    is_of_credentials,
    not_s3,
    status_of,
    unanswered,
    without_etag,
)
from cloudckpt.backends.stores.s3.listing import check_supported, listed_objects, listed_uploads
from cloudckpt.backends.stores.s3.missing import read_object
from cloudckpt.backends.stores.s3.read import read_range, read_whole
from cloudckpt.backends.stores.s3.requests import Requests

_DELETED_AT_ONCE = 1000
_MIN_PART = 5 << 20
_MAX_PART = 5 << 30
_MAX_PARTS = 10_000


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
    def is_remote(self) -> bool:
        return True

    @property
    def lists_at_once(self) -> bool:
        return True

    @property
    def part_limits(self) -> PartLimits:
        return PartLimits(_MIN_PART, _MAX_PART, _MAX_PARTS, in_place=True)

    @property
    def part_checksum(self) -> str | None:
        """As the option says; ``auto`` asks a server other than AWS itself whether it would look at one."""
        option = self._target.options.checksum
        if option != "auto":
            return None if option == "none" else option
        return None if self._refuses_checksums else self._put_support.checksum

    @property
    def capabilities(self) -> Capabilities:
        """Features that the server supports; probing a server other than AWS takes a few requests, once."""
        supported = self._put_support
        return Capabilities(
            conditional_create=supported.create,
            conditional_update=supported.update is not None,
        )

    @property
    def _put_support(self) -> PutSupport:
        with self._requests.explained():
            return server_of(self._requests, self._bucket).put(self._requests, self._bucket, self._prefix)

    @property
    def is_probed(self) -> bool:
        with self._requests.explained():
            return self._requests.clients.is_aws or server_of(self._requests, self._bucket).is_probed

    def features(self) -> str | None:
        with self._requests.explained():
            if self._requests.clients.is_aws:
                return None
            server = server_of(self._requests, self._bucket)
            return str(server.all(self._requests, self._bucket, self._prefix))

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        conditional = self._condition(name, condition)

        def send(clients: Clients) -> str:
            own = {"Body": data, **conditional, **self._put_checksum(clients, data)}
            answer = clients.data.put_object(**self._of(clients, "put_object", name, **own))
            return _version(answer, clients, "PutObject")

        with self._requests.explained(name):
            outcome = self._requests.outcome(send)
            # A precondition that failed is an answer for every try: none can succeed any more.
            if not _is_refused_condition(outcome.error):
                self._check_answered(outcome, "put")
            return ObjectInfo(name, len(data), outcome.result())

    def get(self, name: str) -> tuple[bytes, ObjectInfo]:
        def read(clients: Clients) -> tuple[bytes, ObjectInfo]:
            data, answer = read_whole(clients, self._of(clients, "get_object", name), self._target, name)
            version = _version(answer, clients, "GetObject")
            return data, ObjectInfo(name, len(data), version, answer.get("LastModified"))

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
            version = _version(answer, clients, "HeadObject")
            size = answer.get("ContentLength", -1)
            if size < 0:
                raise not_s3(clients.route, answer, "HeadObject without a Content-Length")
            return ObjectInfo(name, size, version, answer.get("LastModified"))

        return read_object(self._requests, self._target, name, head)

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        return listed_objects(self._requests, self._bucket, self._prefix, prefix, delimiter=delimiter)

    def delete(self, names: Iterable[str]) -> None:
        with self._requests.explained():
            server = server_of(self._requests, self._bucket)
            concurrency = self._target.options.concurrency
            Deleter(self._requests, server, self._bucket, self._prefix, concurrency).delete(names)

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
            abort_others(
                upload,
                self.pending_uploads,
                self.abort_upload,
                uri=self.uri,
                request="CreateMultipartUpload",
                cure="A lifecycle rule for incomplete uploads removes it",
            )
        return upload

    def _begin(self, name: str, declared: dict[str, str]) -> Outcome[str]:
        def begin(clients: Clients) -> str:
            arguments = self._of(clients, "create_multipart_upload", name, **declared)
            answer = clients.data.create_multipart_upload(**arguments)
            if not answer.get("UploadId"):
                raise not_s3(clients.route, answer, "CreateMultipartUpload without an UploadId")
            check_key(answer, arguments["Key"], clients.route, "CreateMultipartUpload")
            return str(answer["UploadId"])

        return self._requests.outcome(begin)

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
        headers = parameters(checksum)
        if wanted is None and self._target.options.checksum == "auto" and self._put_support.content_md5:
            headers = {"ContentMD5": content_md5(*buffers)}

        def send(clients: Clients) -> Part:
            body = BuffersBody(buffers, departed)
            own = {"UploadId": upload.upload_id, "PartNumber": number, "Body": body, **headers}
            answer = clients.data.upload_part(**self._of(clients, "upload_part", upload.name, **own))
            _version(answer, clients, "UploadPart")
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
            answer = clients.completion(**arguments)
            if not answer.get("ETag"):
                raise not_s3(clients.route, answer, "CompleteMultipartUpload without an ETag")
            check_key(answer, arguments["Key"], clients.route, "CompleteMultipartUpload")
            return answer

        size, tag = sum(part.size for part in parts), None
        with self._requests.explained(upload.name):
            outcome = self._requests.outcome(complete, patient=True, on_behalf=True)
            # An earlier try may have been carried out, and the upload have ended with it.
            ended = outcome.attempts > 1 and _is_gone(outcome.error)
            if not ended:
                self._check_answered(outcome, "completion")
            if not ended or not self._has_size(upload.name, size):
                answer = outcome.result()
                self._check(upload.name, contradicted(answer, parts))
                tag = str(answer.get("ETag", "")).strip('"') or None
                if not confirm or (proves(answer, parts) and self._is_version_of_completion()):
                    return ObjectInfo(upload.name, size, tag)
        info = self.stat(upload.name)
        if tag is not None:
            server_of(self._requests, self._bucket).completion_names_version = tag == info.version
        if info.size != size:
            wrong = f"the completed object has {info.size:,} bytes where its parts have {size:,}"
            self._check(upload.name, wrong)
        return info

    def _is_version_of_completion(self) -> bool:
        """Return True if the answer to a completion has the object's version, which a first look tells."""
        known = server_of(self._requests, self._bucket).completion_names_version
        return self._requests.clients.is_aws or bool(known)

    def _check_answered(self, outcome: Outcome[Any], what: str) -> None:
        """Refuse to call a request failed that may have been carried out, or still be."""
        if outcome.error is not None and outcome.lost:
            route = self._requests.clients.route
            raise unanswered(what, outcome.attempts, outcome.error, self._target, route) from outcome.error

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
            check_supported(outcome.error)
            if not _is_gone(outcome.error):
                outcome.result()

    def pending_uploads(self, prefix: str = "") -> Iterator[PendingUpload]:
        return listed_uploads(self._requests, self._bucket, self._prefix, prefix)

    def copy_from(self, source: ObjectStore, info: ObjectInfo) -> ObjectInfo | None:
        """By CopyObject, and part by part beyond what that takes."""
        if not isinstance(source, S3Store):
            return None
        theirs = source._target  # noqa: SLF001 - of this class
        if not self._target.options.reaches_as(theirs.options):
            return None
        with self._requests.explained(info.name):
            server = server_of(self._requests, self._bucket)
            form = server.copy_source(self._requests, self._bucket, self._prefix)
            original = Original(info, theirs.bucket, f"{theirs.path}/{info.name}".lstrip("/"), form)
            copied = Copying(self, self._requests, functools.partial(self._of, name=info.name)).of(original)
            if copied is not None and form is None and source.stat(info.name).version != info.version:
                self.delete([info.name])  # of another version, which the server did not refuse
                return None
            return copied

    def hold(self) -> None:
        _ = self._requests.clients

    def close(self) -> None:
        self._requests.close()

    def _of(self, clients: Clients, method: str, name: str, **own: Any) -> dict[str, Any]:
        """Return the arguments of a method that concerns one object."""
        return clients.arguments(method, Bucket=self._bucket, Key=self._prefix + name, **own)

    def _condition(self, name: str, condition: Condition) -> dict[str, str]:
        if isinstance(condition, Overwrite):
            return {}
        supported = self._put_support
        if isinstance(condition, Create) and supported.create:
            return {"IfNoneMatch": "*"}
        if isinstance(condition, Update) and supported.update is not None:
            return {"IfMatch": supported.update.of(condition.version)}
        raise ConfigurationError(
            "the server does not support the condition of a put", uri=self.uri, object_name=name
        )

    def _put_checksum(self, clients: Clients, data: bytes) -> dict[str, str]:
        """Return the checksum to send with a put: a bucket with Object Lock demands one.

        AWS is sent a CRC, as with parts. Every other server takes Content-MD5, which needs no probe.
        """
        option = self._target.options.checksum
        if option == "none":
            return {}
        if not clients.is_aws:
            return {"ContentMD5": content_md5(data)}
        return parameters(
            given_or_of(CRC64NVME.name if option == "auto" else option, None, [memoryview(data)])
        )

    def _declaration(self) -> dict[str, str]:
        return {"ChecksumAlgorithm": wanted.upper()} if (wanted := self.part_checksum) else {}

    def _may_do_without_checksum(self, error: Exception | None) -> bool:
        if self._target.options.checksum != "auto" or not isinstance(error, ClientError):
            return False
        refused = status_of(error) in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_IMPLEMENTED)
        return refused and not is_of_credentials(error)


def _version(answer: dict[str, Any], clients: Clients, operation: str) -> str:
    """Return the entity tag without its quotes, which servers put in some answers and leave out of others."""
    if not answer.get("ETag"):
        raise without_etag(clients.route, operation, answer)
    return str(answer["ETag"]).strip('"')


def _is_refused_condition(error: Exception | None) -> bool:
    return isinstance(error, ClientError) and status_of(error) == HTTPStatus.PRECONDITION_FAILED


def _is_gone(error: Exception | None) -> bool:
    return isinstance(error, ClientError) and code_of(error) == "NoSuchUpload"
