"""What the S3 store sends, byte for byte as a server receives it."""

from __future__ import annotations

import base64
import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from awscrt import checksums

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.stores.base import Overwrite
from cloudckpt.backends.stores.http.request_body import BuffersBody
from cloudckpt.backends.stores.s3 import store as s3
from support.certificate import self_signed
from support.proxy import Answer, Proxy, Request, proxied
from support.servers import S3Server

_PART = 5 << 20
_DATA = random.Random(0).randbytes(_PART + 1000)
_SCHEMES = ("http", "https")

Connected = tuple[Proxy, s3.S3Store]
Connect = Callable[..., Connected]


@pytest.fixture(params=_SCHEMES)
def connect(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connect]:
    """Open a store on a server, with a proxy between them that keeps what was sent."""
    with contextlib.ExitStack() as stack:

        def connected(server: S3Server, *, config: dict[str, Any] | None = None, **options: Any) -> Connected:
            tls, verify = None, None
            if request.param == "https":
                tls, verify = self_signed(tmp_path_factory.mktemp("tls"))
            proxy = stack.enter_context(proxied(server.endpoint, tls))
            keywords = {
                "endpoint_url": proxy.endpoint,
                "region": "us-east-1",
                "storage_options": {
                    **server.storage_options,
                    "client_kwargs": {"verify": str(verify)} if verify else {},
                    "config_kwargs": config or {},
                },
                **options,
            }
            store = s3.S3Store(Target.parse(f"s3://{server.new_bucket()}/run", **keywords))
            return proxy, stack.enter_context(store)

        yield connected


class _CountedBody(BuffersBody):
    """A body that counts the bytes that are read from it."""

    handed_out = 0

    def read(self, size: int = -1, /) -> Any:
        view = super().read(size)
        if isinstance(view, memoryview):  # else a connection gets the body as a whole, and reads it then
            type(self).handed_out += view.nbytes
        return view


def _send(store: s3.S3Store) -> None:
    view = memoryview(_DATA)
    upload = store.begin_upload("upload")
    parts = [
        store.upload_part(upload, 1, 0, [view[:7], view[7 : 2 << 20], view[2 << 20 : _PART]]),
        store.upload_part(upload, 2, _PART, [view[_PART:]]),
    ]
    store.complete_upload(upload, parts)


def _assert_plain(request: Request, data: bytes) -> None:
    """Assert that a request's body is the data and nothing else, said by its length and not in chunks."""
    assert request.body == data
    assert request.headers["content-length"] == str(len(data))
    for header in ("transfer-encoding", "content-encoding", "x-amz-trailer", "x-amz-decoded-content-length"):
        assert header not in request.headers


@pytest.mark.parametrize("checksum", ["auto", "none"])
def test_a_part_is_read_once_and_sent_plain_and_unsigned(
    connect: Connect, moto: S3Server, monkeypatch: pytest.MonkeyPatch, checksum: str
) -> None:
    monkeypatch.setattr(s3, "BuffersBody", _CountedBody)
    monkeypatch.setattr(_CountedBody, "handed_out", 0)
    proxy, store = connect(moto, checksum=checksum)
    _send(store)
    first, last = proxy.seen("UploadPart")
    _assert_plain(first, _DATA[:_PART])
    _assert_plain(last, _DATA[_PART:])
    for request in (first, last):
        assert request.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
        assert "content-md5" not in request.headers
        assert request.headers["authorization"].startswith("AWS4-HMAC-SHA256 ")
    assert _CountedBody.handed_out == len(_DATA)


@pytest.mark.parametrize(("checksum", "digits"), [("crc64nvme", 8), ("crc32c", 4)])
def test_a_part_carries_its_checksum_in_one_header(
    connect: Connect, moto: S3Server, checksum: str, digits: int
) -> None:
    proxy, store = connect(moto, checksum=checksum)
    _send(store)
    for request in proxy.seen("UploadPart"):
        sent = {name: value for name, value in request.headers.items() if "checksum" in name}
        value = getattr(checksums, checksum)(request.body)
        encoded = base64.b64encode(value.to_bytes(digits, "big")).decode()
        assert sent.pop(f"x-amz-checksum-{checksum}") == encoded
        assert sent in ({}, {"x-amz-sdk-checksum-algorithm": checksum.upper()})


def test_without_checksums_no_request_about_an_object_has_one(connect: Connect, moto: S3Server) -> None:
    proxy, store = connect(moto, checksum="none")
    _send(store)
    store.put("put", b"data", Overwrite())
    for operation in ("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"):
        requests = proxy.seen(operation)
        assert requests
        assert not [name for request in requests for name in request.headers if "checksum" in name]


def test_what_is_stored_is_what_was_given_and_no_encoding_of_it(
    connect: Connect, s3_server: S3Server
) -> None:
    proxy, store = connect(s3_server)
    _send(store)
    store.put("put", _DATA, Overwrite())
    _assert_plain(proxy.seen("PutObject")[-1], _DATA)
    bucket = store.uri.removeprefix("s3://").partition("/")[0]
    for name in ("upload", "put"):
        answer = s3_server.client().get_object(Bucket=bucket, Key=f"run/{name}")
        assert answer["Body"].read() == _DATA
        assert "ContentEncoding" not in answer


def test_a_part_sent_again_is_read_again_and_sent_whole(
    connect: Connect, moto: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "BuffersBody", _CountedBody)
    monkeypatch.setattr(_CountedBody, "handed_out", 0)
    proxy, store = connect(moto)
    proxy.spoil("UploadPart", [Answer(503, "SlowDown")])
    _send(store)
    assert [request.body == _DATA[:_PART] for request in proxy.seen("UploadPart")] == [True, True, False]
    assert _CountedBody.handed_out == len(_DATA) + _PART


def test_a_range_is_one_request_for_exactly_its_bytes(connect: Connect, moto: S3Server) -> None:
    proxy, store = connect(moto)
    store.put("name", _DATA, Overwrite())
    memory = bytearray(3000)
    store.read_into("name", 17, [memoryview(memory)[:1], memoryview(memory)[1:]])
    assert memory == _DATA[17:3017]
    assert [request.headers["range"] for request in proxy.seen("GetObject")] == ["bytes=17-3016"]
    assert not proxy.seen("HeadObject")


def test_a_request_says_what_made_it_and_what_the_options_add(connect: Connect, moto: S3Server) -> None:
    proxy, store = connect(moto, config={"user_agent_extra": "job/7"})
    _send(store)
    (agent,) = {request.headers["user-agent"] for request in proxy.seen("UploadPart")}
    assert agent.startswith(f"cloudckpt/{cloudckpt.__version__} Botocore/")
    assert agent.endswith(" job/7")
