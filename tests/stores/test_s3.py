"""The S3 store against real servers, with what each of them gets wrong written down."""

from __future__ import annotations

import io
import itertools
import random
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import (
    AccessDeniedError,
    CheckpointError,
    ConfigurationError,
    ObjectNotFoundError,
    StorageError,
)
from cloudckpt.backends.stores.base import ObjectStore, Overwrite
from cloudckpt.backends.stores.http.request_body import BuffersBody
from cloudckpt.backends.stores.s3.store import S3Store
from support.conformance import StoreConformance
from support.servers import S3Server, unused_port
from support.shortcomings import FAULTS, RACES


class TestS3Store(StoreConformance):
    many = 1001

    @pytest.fixture
    def secrets(self, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Sequence[str]:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret)
        return [s3_server.secret]

    @pytest.fixture
    def faults(self, s3_server: S3Server) -> Mapping[str, str]:
        return FAULTS[s3_server.name]

    @pytest.fixture
    def races(self, s3_server: S3Server) -> Mapping[str, str]:
        return RACES.get(s3_server.name, {})

    @pytest.fixture
    def store(self, s3_server: S3Server, secrets: Sequence[str]) -> S3Store:
        assert secrets
        # rclone deletes a folder with its last object, and then answers 500 to a part of an upload into it.
        prefix = "" if s3_server.name == "rclone" else "/a run/prefix"
        uri = f"s3://{s3_server.new_bucket()}{prefix}"
        return S3Store(Target.parse(uri, endpoint_url=s3_server.endpoint, region="us-east-1", retries=1))

    def beside(self, store: ObjectStore) -> ObjectStore:
        uri = f"s3://{self.server.new_bucket()}"
        return S3Store(Target.parse(uri, endpoint_url=self.server.endpoint, region="us-east-1", retries=1))

    @pytest.fixture(autouse=True)
    def _server(self, s3_server: S3Server) -> None:
        self.server = s3_server

    def raw_read(self, store: ObjectStore, name: str) -> bytes | None:
        bucket, key = _place(store, name)
        client = self.server.client()
        try:
            return client.get_object(Bucket=bucket, Key=key)["Body"].read()
        except client.exceptions.NoSuchKey:
            return None

    def raw_write(self, store: ObjectStore, name: str, data: bytes) -> None:
        bucket, key = _place(store, name)
        self.server.client().put_object(Bucket=bucket, Key=key, Body=data)


def _place(store: ObjectStore, name: str) -> tuple[str, str]:
    bucket, _, prefix = store.uri.removeprefix("s3://").partition("/")
    return bucket, f"{prefix}/{name}".lstrip("/")


class WebServer(ThreadingHTTPServer):
    """An HTTP server that answers every request with a page and ``status``."""

    status = 200

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Page(BaseHTTPRequestHandler):
    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        page = b"<html><body>Welcome</body></html>"
        assert isinstance(self.server, WebServer)
        self.send_response(self.server.status)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815 - the base class names them

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it
        pass


@pytest.fixture(scope="module")
def web_server() -> Iterator[WebServer]:
    with WebServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever, name="web server")
        thread.start()
        yield server
        server.shutdown()
        thread.join()


_HIDDEN = "this must not show"


def _store(uri: str, endpoint: str, **options: Any) -> S3Store:
    keywords = {"region": "us-east-1", "storage_options": {"key": "test", "secret": _HIDDEN}, **options}
    return S3Store(Target.parse(uri, endpoint_url=endpoint, **keywords))


_OPERATIONS: Mapping[str, Callable[[S3Store], object]] = {
    "put": lambda store: store.put("name", b"data", Overwrite()),
    "get": lambda store: store.get("name"),
    "read_into": lambda store: store.read_into("name", 0, [memoryview(bytearray(1))]),
    "stat": lambda store: store.stat("name"),
    "list": lambda store: store.list(),
    "delete": lambda store: store.delete(["name"]),
    "begin_upload": lambda store: store.begin_upload("name"),
    "pending_uploads": lambda store: list(store.pending_uploads()),
}
_every_operation = pytest.mark.parametrize("operation", sorted(_OPERATIONS))


def _failure(store: S3Store, operation: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        _OPERATIONS[operation](store)
    error = caught.value
    assert error.uri == store.uri
    if operation not in ("list", "delete", "pending_uploads"):
        assert error.object_name == "name"
    shown = f"{error} {error!r} {store!r} {''.join(traceback.format_exception(error))}"
    assert _HIDDEN not in shown
    assert error.hint
    return error


@_every_operation
def test_a_missing_bucket_is_said_to_be_missing(moto: S3Server, operation: str) -> None:
    store = _store("s3://no-such-bucket/run", moto.endpoint)
    if operation == "stat":  # the answer to a HEAD has no body to tell a bucket from an object
        with pytest.raises(ObjectNotFoundError, match="no-such-bucket"):
            store.stat("name")
        return
    error = _failure(store, operation)
    assert isinstance(error, ObjectNotFoundError)
    assert "bucket 'no-such-bucket' does not exist" in str(error)


@_every_operation
@pytest.mark.parametrize("key", ["test", "nobody"])
def test_wrong_credentials_are_refused(rclone: S3Server, operation: str, key: str) -> None:
    options = {"storage_options": {"key": key, "secret": _HIDDEN}}
    store = _store(f"s3://{rclone.new_bucket()}/run", rclone.endpoint, **options)
    assert isinstance(_failure(store, operation), AccessDeniedError)


@_every_operation
def test_no_credentials_are_said_to_be_missing(moto: S3Server, operation: str) -> None:
    store = _store("s3://bucket/run", moto.endpoint, storage_options={})
    error = _failure(store, operation)
    assert isinstance(error, AccessDeniedError)
    assert "AWS environment variables" in str(error)


@_every_operation
def test_credentials_that_have_expired_and_can_not_be_renewed_are_said_to_have(
    moto: S3Server, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, _HIDDEN)
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", "2020-01-01T00:00:00Z")
    store = _store("s3://bucket/run", moto.endpoint, storage_options={})
    error = _failure(store, operation)
    assert isinstance(error, AccessDeniedError)
    assert "have expired" in str(error)


@pytest.mark.parametrize("operation", ["put", "list"])
def test_an_endpoint_that_refuses_is_given_up_soon(operation: str) -> None:
    store = _store("s3://bucket/run", f"http://127.0.0.1:{unused_port()}", retries=20)
    error = _failure(store, operation)  # twenty retries would outlast this test's time limit
    assert isinstance(error, StorageError)
    assert "cannot reach the endpoint" in str(error)


@_every_operation
@pytest.mark.parametrize("status", [200, 404, 405])
def test_an_endpoint_that_is_not_s3_is_found_out(web_server: WebServer, operation: str, status: int) -> None:
    web_server.status = status
    error = _failure(_store("s3://bucket/run", web_server.endpoint), operation)
    assert type(error) is StorageError
    assert "not as an S3 server does" in str(error)


def test_an_unknown_profile_is_a_configuration_error(moto: S3Server) -> None:
    error = _failure(_store("s3://bucket/run", moto.endpoint, profile="nobody"), "put")
    assert isinstance(error, ConfigurationError)


def test_an_unknown_storage_option_is_refused(moto: S3Server) -> None:
    store = _store("s3://bucket/run", moto.endpoint, storage_options={"kee": _HIDDEN})
    with pytest.raises(ConfigurationError, match="kee") as caught:
        store.stat("name")
    assert _HIDDEN not in str(caught.value)


def test_what_is_written_has_the_encryption_and_class_asked_for(moto: S3Server) -> None:
    bucket = moto.new_bucket()
    options = {"sse": "aws:kms", "sse_kms_key_id": "a-key", "storage_class": "STANDARD_IA"}
    store = _store(f"s3://{bucket}", moto.endpoint, requester_pays=True, **options)
    store.put("put", b"data", Overwrite())
    upload = store.begin_upload("upload")
    store.complete_upload(upload, [store.upload_part(upload, 1, 0, [memoryview(b"data")])])
    for name in ("put", "upload"):
        head = moto.client().head_object(Bucket=bucket, Key=name)
        found = (head["ServerSideEncryption"], head["SSEKMSKeyId"], head["StorageClass"])
        assert found == ("aws:kms", "a-key", "STANDARD_IA")


@pytest.mark.parametrize(
    ("option", "algorithm"),
    [("crc64nvme", "crc64nvme"), ("crc32c", "crc32c"), ("none", None)],
)
def test_each_part_carries_the_checksum_asked_for(
    s3_server: S3Server, option: str, algorithm: str | None
) -> None:
    credentials = {"storage_options": s3_server.storage_options}
    bucket = s3_server.new_bucket()
    store = _store(f"s3://{bucket}", s3_server.endpoint, checksum=option, **credentials)
    data = random.Random(0).randbytes((5 << 20) + 999)
    upload = store.begin_upload("name")
    parts = [
        store.upload_part(upload, 1, 0, [memoryview(data)[: 5 << 20]]),
        store.upload_part(upload, 2, 5 << 20, [memoryview(data)[5 << 20 :][:99], memoryview(data)[-900:]]),
    ]
    assert [part.checksum and part.checksum.partition(":")[0] for part in parts] == [algorithm, algorithm]
    assert store.complete_upload(upload, parts).size == len(data)
    assert store.get("name")[0] == data


@pytest.mark.parametrize("name", ["moto", "ministack", "rclone"])
def test_the_conditions_that_a_server_honours_are_found_out(
    s3_server_named: Callable[[str], S3Server], name: str
) -> None:
    server = s3_server_named(name)
    bucket = server.new_bucket()
    store = _store(f"s3://{bucket}", server.endpoint, storage_options=server.storage_options)
    found = store.capabilities
    assert (found.conditional_create, found.conditional_update) == (name != "rclone", name != "rclone")
    assert "Contents" not in server.client().list_objects_v2(Bucket=bucket)


def test_a_body_is_read_in_slices_of_the_buffers_themselves() -> None:
    data = bytearray(random.Random(0).randbytes(3 << 20))
    buffers = [memoryview(data)[: (2 << 20) + 5], memoryview(b""), memoryview(data)[(2 << 20) + 5 :]]
    body = BuffersBody(buffers)
    views = list(iter(lambda: body.read(16 << 20), b""))
    assert b"".join(views) == data
    assert all(view.obj is data and view.nbytes <= 1 << 20 for view in views)
    assert body.tell() == len(body) == len(data)
    body.seek(-4, io.SEEK_END)
    tail = bytearray(9)
    assert body.readinto(memoryview(tail)) == 4
    assert tail[:4] == data[-4:]


def test_small_buffers_that_follow_one_another_are_sent_together() -> None:
    data = random.Random(0).randbytes(6 << 20)
    chosen = random.Random(1)
    cuts = sorted({0, len(data), *(chosen.randrange(2 << 20, len(data)) for _ in range(300))})
    buffers = [memoryview(data)[start:stop] for start, stop in itertools.pairwise(cuts)]
    departed: list[int] = []
    body = BuffersBody(buffers, departed.append)
    views = list(iter(lambda: body.read(1 << 17), b""))
    assert b"".join(views) == data
    assert len(views) < 30
    assert max(view.nbytes for view in views) <= 1 << 20
    assert departed == [0, *itertools.accumulate(view.nbytes for view in views)]
    body.seek(3 << 20)
    assert b"".join(iter(lambda: body.read(1000), b"")) == data[3 << 20 :]
    few = BuffersBody([memoryview(data)[:10], memoryview(data)[10:30]])
    assert [few.read(25).nbytes, few.read(25).nbytes] == [10, 20]
