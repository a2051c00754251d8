"""Objects in a bucket of Google Cloud Storage, by its JSON API."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final, TypeVar
from urllib.parse import quote

import urllib3

from cloudckpt.backends.checksum import CRC32C
from cloudckpt.backends.errors import (
    AccessDeniedError,
    IntegrityError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
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
from cloudckpt.backends.stores import gcs_batch, gcs_session
from cloudckpt.backends.stores.gcs_client import Client
from cloudckpt.backends.stores.gcs_errors import RefusedError, explained, judge
from cloudckpt.backends.stores.gcs_session import Session
from cloudckpt.backends.stores.response_body import BrokenOffError, fill
from cloudckpt.backends.stores.retry import Outcome, Retries, Verdict
from cloudckpt.backends.stores.s3_body import BuffersBody
from cloudckpt.backends.target import Target

_T = TypeVar("_T")

_GRANULE: Final = 256 << 10
"""Bytes that a session takes multiples of."""
_TIMEOUTS: Final = 5
"""Budget of a request, in timeouts."""
_LEAST_SECONDS: Final = 30.0
_FIELDS: Final = "name,size,generation,updated,crc32c"


class GCSStore(ObjectStore):
    """Objects below ``gs://bucket/prefix``.

    An upload is a resumable session: its id is the session's URL, with which any process may go on. A put
    with a condition is repeated when its answer is lost, like any request. So a ``PreconditionFailedError``
    may mean that an earlier try of this very put won: the caller tells by what it finds in the object.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._bucket = target.bucket
        self._prefix = f"{target.path}/" if target.path else ""
        self._lock = threading.Lock()
        self._held: tuple[int, Client] | None = None

    def __reduce__(self) -> tuple[type[GCSStore], tuple[Target]]:
        return type(self), (self._target,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    @property
    def uri(self) -> str:
        return self._target.uri

    @property
    def part_limits(self) -> PartLimits:
        return PartLimits(min_size=_GRANULE, multiple=_GRANULE, in_order=True)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(conditional_create=True, conditional_update=True)

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        parameters = {"uploadType": "multipart", "fields": _FIELDS, **self._written(), **_when(condition)}
        resource = {**self._resource(name), "crc32c": CRC32C.text(CRC32C.of(data)).partition(":")[2]}
        border = os.urandom(16).hex()
        head = (
            f"--{border}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(resource)}\r\n"
            f"--{border}\r\nContent-Type: application/octet-stream\r\n\r\n"
        ).encode()
        pieces = [memoryview(piece) for piece in (head, data, f"\r\n--{border}--\r\n".encode())]
        headers = {"Content-Type": f"multipart/related; boundary={border}"}

        def send(client: Client) -> ObjectInfo:
            where = f"/upload{client.objects(self._bucket)}"
            answer = client.request(
                "put", "POST", where, parameters=parameters, headers=headers, body=BuffersBody(pieces)
            )
            return self._info(_document(answer))

        return self._ask(send, name)

    def get(self, name: str) -> tuple[bytes, ObjectInfo]:
        def read(client: Client) -> tuple[bytes, ObjectInfo]:
            answer = self._download(client, name, {})
            data = memoryview(bytearray(int(answer.headers["Content-Length"])))
            fill(answer, [data], None)
            answer.release_conn()
            return bytes(data), _downloaded(name, data.nbytes, answer.headers)

        return self._ask(read, name)

    def read_into(
        self,
        name: str,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        arrived: Arrived | None = None,
    ) -> int | None:
        size = sum(buffer.nbytes for buffer in buffers)

        def read(client: Client) -> int | None:
            answer = self._download(client, name, {"Range": f"bytes={offset}-{offset + size - 1}"})
            if arrived is not None:
                arrived(0)
            try:
                whole = _whole_size(answer, offset, size, client.endpoint)
                fill(answer, buffers, arrived)
            except BaseException:
                answer.close()  # what is left of it would be taken for the next answer
                raise
            return whole

        return self._ask(read, name) if size else None

    def _download(self, client: Client, name: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        where = f"/download{self._path(client, name)}"
        return client.request("get", "GET", where, parameters={"alt": "media"}, headers=headers)

    def stat(self, name: str) -> ObjectInfo:
        def ask(client: Client) -> ObjectInfo:
            answer = client.request("get", "GET", self._path(client, name), parameters={"fields": _FIELDS})
            return self._info(_document(answer))

        return self._ask(ask, name)

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        objects: list[ObjectInfo] = []
        prefixes: set[str] = set()
        parameters = {
            "prefix": self._prefix + prefix,
            "fields": f"items({_FIELDS}),prefixes,nextPageToken",
            **({"delimiter": "/"} if delimiter else {}),
        }
        while True:
            page = self._ask(
                lambda client: _document(
                    client.request("list", "GET", client.objects(self._bucket), parameters=parameters)
                )
            )
            # A key that ends in a slash is the folder that a web console shows, not an object of ours.
            objects += [self._info(item) for item in page.get("items", ()) if not item["name"].endswith("/")]
            prefixes.update(one.removeprefix(self._prefix) for one in page.get("prefixes", ()))
            if not (token := page.get("nextPageToken")):
                break
            parameters["pageToken"] = token
        return Listing(tuple(sorted(objects, key=lambda info: info.name)), tuple(sorted(prefixes)))

    def delete(self, names: Iterable[str]) -> None:
        remaining = iter(names)
        while batch := list(itertools.islice(remaining, gcs_batch.AT_ONCE)):
            self._ask(self._deletion(batch))

    def _deletion(self, names: Sequence[str]) -> Callable[[Client], None]:
        left = [*names]

        def delete(client: Client) -> None:
            query = client.always and f"?{client.always}"
            kind, body = gcs_batch.deletions([self._path(client, name) + query for name in left])
            answer = client.request(
                "delete", "POST", "/batch/storage/v1", headers={"Content-Type": kind}, body=body
            )
            results = gcs_batch.answers(answer.headers.get("Content-Type", ""), answer.data)
            failed = {
                left[number]: RefusedError("delete", status, said)
                for number, (status, said) in sorted(results.items())
                if status >= 300 and status != HTTPStatus.NOT_FOUND  # noqa: PLR2004 - all that is no success
            }
            # One that was not answered counts as not deleted.
            left[:] = [name for number, name in enumerate(left) if name in failed or number not in results]
            final = [name for name, error in failed.items() if judge(error).verdict is Verdict.FINAL]
            for name in final:
                with explained(self._target, client.endpoint, name):
                    raise failed[name]
            for error in failed.values():
                raise error
            if left:
                raise BrokenOffError

        return delete

    def begin_upload(self, name: str) -> Upload:
        parameters = {"uploadType": "resumable", **self._written()}
        body = json.dumps(self._resource(name)).encode()
        headers = {
            "Content-Type": "application/json; charset=UTF-8",
            "X-Upload-Content-Type": "application/octet-stream",
        }

        def begin(client: Client) -> Upload:
            where = f"/upload{client.objects(self._bucket)}"
            answer = client.request(
                "begin an upload", "POST", where, parameters=parameters, headers=headers, body=body
            )
            answer.drain_conn()
            answer.release_conn()
            if "Location" not in answer.headers:
                raise StorageError(f"the endpoint {client.endpoint} answered, but not as GCS does")
            return Upload(name, answer.headers["Location"])

        return self._ask(begin, name)

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
        sending = Session(upload.upload_id).part(offset, buffers, departed)
        self._ask(sending.go_on, upload.name)
        return Part(number, sending.size, sending.tail, checksum)

    def complete_upload(self, upload: Upload, parts: Sequence[Part], *, confirm: bool = True) -> ObjectInfo:
        del confirm  # the answer says all there is to know
        document = self._ask(Session(upload.upload_id).ending(parts), upload.name, on_behalf=True)
        return self._info(document)

    def abort_upload(self, upload: Upload) -> None:
        self._ask(Session(upload.upload_id).cancel, upload.name)

    def pending_uploads(self, prefix: str = "") -> Iterator[PendingUpload]:
        """Nothing: GCS does not list sessions. It forgets them after a week, and charges nothing for them."""
        del prefix
        return iter(())

    def is_pending(self, upload: Upload) -> bool:
        """Asks the session, if its URL is one of this bucket's: nothing is sent to any other."""
        with explained(self._target, self._target.options.endpoint_url or "GCS", upload.name):
            client = self._client()
        if not gcs_session.belongs(upload.upload_id, client.endpoint, self._bucket):
            return False
        return self._ask(Session(upload.upload_id).is_open, upload.name)

    def copy_from(self, source: ObjectStore, info: ObjectInfo) -> ObjectInfo | None:
        """By a rewrite, as many calls of it as GCS wants for an object of this size."""
        options = self._target.options
        if not isinstance(source, GCSStore):
            return None
        theirs = source._target  # noqa: SLF001 - of this class
        if not options.reaches_as(theirs.options):
            return None
        key = quote(f"{theirs.path}/{info.name}".lstrip("/"), safe="")
        # Without a resource the original's is kept.
        storage_class, kms_key = options.storage_class, options.kms_key_name
        resource = json.dumps({"storageClass": storage_class}).encode() if storage_class else b""
        parameters = {
            "fields": f"done,rewriteToken,resource({_FIELDS})",
            **({"ifSourceGenerationMatch": info.version} if info.version else {}),
            **({"destinationKmsKeyName": kms_key} if kms_key else {}),
        }
        there = f"/rewriteTo/b/{quote(self._bucket, safe='')}/o/{quote(self._prefix + info.name, safe='')}"

        def rewrite(client: Client) -> dict[str, Any]:
            where = f"{client.objects(theirs.bucket)}/{key}{there}"
            headers = {"Content-Type": "application/json; charset=UTF-8"}
            answer = client.request(
                "copy", "POST", where, parameters=parameters, headers=headers, body=resource
            )
            return _document(answer)

        try:
            while not (document := self._ask(rewrite, info.name)).get("done"):
                parameters["rewriteToken"] = document["rewriteToken"]
        except (AccessDeniedError, ObjectNotFoundError, PreconditionFailedError):
            return None
        return self._info(document["resource"])

    def close(self) -> None:
        with self._lock:
            held, self._held = self._held, None
        if held is not None and held[0] == os.getpid():
            held[1].close()

    def _client(self) -> Client:
        with self._lock:
            if self._held is None or self._held[0] != os.getpid():
                self._held = (os.getpid(), Client(self._target))
            return self._held[1]

    def _ask(self, act: Callable[[Client], _T], name: str | None = None, *, on_behalf: bool = False) -> _T:
        with explained(self._target, self._target.options.endpoint_url or "GCS", name):
            client = self._client()
        with explained(self._target, client.endpoint, name):
            return self._outcome(client, act, on_behalf=on_behalf).result()

    def _outcome(
        self, client: Client, act: Callable[[Client], _T], *, on_behalf: bool = False
    ) -> Outcome[_T]:
        options = self._target.options
        retries = Retries(
            judge,
            client.paces.on_behalf if on_behalf else client.paces.transfers,
            f"{client.endpoint}/{self._bucket}",
            retries=options.retries,
            seconds=max(_LEAST_SECONDS, options.timeout * _TIMEOUTS),
        )
        return retries.outcome(lambda: act(client), renew=client.renew)

    def _path(self, client: Client, name: str) -> str:
        return f"{client.objects(self._bucket)}/{quote(self._prefix + name, safe='')}"

    def _resource(self, name: str) -> dict[str, str]:
        storage_class = self._target.options.storage_class
        return {"name": self._prefix + name, **({"storageClass": storage_class} if storage_class else {})}

    def _written(self) -> dict[str, str]:
        key = self._target.options.kms_key_name
        return {"kmsKeyName": key} if key else {}

    def _info(self, resource: dict[str, Any]) -> ObjectInfo:
        updated, crc = resource.get("updated"), resource.get("crc32c")
        return ObjectInfo(
            resource["name"].removeprefix(self._prefix),
            int(resource["size"]),
            str(resource["generation"]),
            # To the second, as a download tells it.
            datetime.fromisoformat(updated).replace(microsecond=0) if updated else None,
            f"{CRC32C.name}:{crc}" if crc else None,
        )


def _downloaded(name: str, size: int, headers: Mapping[str, str]) -> ObjectInfo:
    """What the headers of a download tell of the object."""
    modified, hashes = headers.get("Last-Modified"), headers.get("x-goog-hash", "")
    crc = next((one[7:] for one in hashes.replace(" ", "").split(",") if one.startswith("crc32c=")), None)
    return ObjectInfo(
        name,
        size,
        headers.get("x-goog-generation"),
        parsedate_to_datetime(modified) if modified else None,
        f"{CRC32C.name}:{crc}" if crc else None,
    )


def _document(answer: urllib3.BaseHTTPResponse) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.data)
    return found


def _when(condition: Condition) -> dict[str, str]:
    match condition:
        case Overwrite():
            return {}
        case Create():
            return {"ifGenerationMatch": "0"}
        case Update(version):
            return {"ifGenerationMatch": version}


def _whole_size(answer: urllib3.BaseHTTPResponse, offset: int, size: int, endpoint: str) -> int | None:
    """Return what stands behind the slash in ``Content-Range: bytes 0-9/100``, once the range is right."""
    given, length = answer.headers.get("Content-Range"), int(answer.headers["Content-Length"])
    if given is None:
        if offset:
            raise StorageError(f"the endpoint {endpoint} ignores ranges")
    elif not given.startswith(f"bytes {offset}-"):
        raise StorageError(f"the endpoint {endpoint} answered with another range than was asked for")
    if length < size:
        raise IntegrityError(f"the object ends at byte {offset + length}, before byte {offset + size}")
    whole = length if given is None else given.rpartition("/")[2]
    return int(whole) if str(whole).isdigit() else None
