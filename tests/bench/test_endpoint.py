"""The benchmarks' server is S3 as far as its clients use it: else they would measure something else."""

from __future__ import annotations

import http.client
import itertools
import random
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from bench.endpoint import Endpoint, served
from bench.endpoint_store import PIECE, SMALL, Pool
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.stores.s3.store import S3Store
from support.conformance import StoreConformance

_MIB = 1 << 20


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def bucket(endpoint: Endpoint) -> str:
    return endpoint.server.new_bucket()


@pytest.fixture(scope="module")
def other_process() -> Iterator[ThreadPoolExecutor]:
    """No other process: that uploads outlive theirs is a promise of the store, and tested where it is."""
    with ThreadPoolExecutor(1) as other:
        yield other


class TestEndpoint(StoreConformance):
    many = 1001

    @pytest.fixture
    def secrets(self, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Sequence[str]:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", endpoint.server.key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", endpoint.server.secret)
        return [endpoint.server.secret]

    @pytest.fixture
    def store(self, endpoint: Endpoint, secrets: Sequence[str]) -> S3Store:
        assert secrets
        self.client = endpoint.server.client()
        uri = f"s3://{endpoint.server.new_bucket()}/a run/prefix"
        return S3Store(
            Target.parse(uri, endpoint_url=endpoint.server.endpoint, region="us-east-1", retries=1)
        )

    def raw_read(self, store: ObjectStore, name: str) -> bytes | None:
        bucket, key = _place(store, name)
        try:
            return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return None

    def raw_write(self, store: ObjectStore, name: str, data: bytes) -> None:
        bucket, key = _place(store, name)
        self.client.put_object(Bucket=bucket, Key=key, Body=data)


def _place(store: ObjectStore, name: str) -> tuple[str, str]:
    bucket, _, prefix = store.uri.removeprefix("s3://").partition("/")
    return bucket, f"{prefix}/{name}"


def _ask(
    endpoint: Endpoint, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send a request as it is written here; an underscore in a header's name is a hyphen."""
    connection = http.client.HTTPConnection(urlsplit(endpoint.server.endpoint).netloc, timeout=60)
    with closing(connection):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def _upload(endpoint: Endpoint, bucket: str, key: str, parts: Sequence[bytes]) -> None:
    client = endpoint.server.client()
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    etags = [
        client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=part)["ETag"]
        for number, part in enumerate(parts, 1)
    ]
    client.complete_multipart_upload(
        Bucket=bucket,
        Key=key,
        UploadId=upload,
        MultipartUpload={
            "Parts": [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        },
    )


@pytest.mark.parametrize(
    ("asked", "first", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100000-1000000", 100_000, 1_000_001),
        ("bytes=262142-", 262_142, 1_310_725),
        ("bytes=0-9999999", 0, 1_310_725),
        ("bytes=-7", 1_310_718, 1_310_725),
        ("bytes=-9999999", 0, 1_310_725),
    ],
)
def test_a_range_runs_through_parts(
    endpoint: Endpoint, bucket: str, asked: str, first: int, stop: int
) -> None:
    sizes = (PIECE - 1, 2 * PIECE, 2 * PIECE + 6)  # the parts end within, with and behind a piece
    parts = [random.Random(n).randbytes(size) for n, size in enumerate(sizes)]
    _upload(endpoint, bucket, "parts", parts)
    status, headers, data = _ask(endpoint, "GET", f"/{bucket}/parts", Range=asked)
    assert data == b"".join(parts)[first:stop]
    assert (status, headers["Content-Range"]) == (206, f"bytes {first}-{stop - 1}/1310725")


@pytest.mark.parametrize("asked", ["bytes=10-", "bytes=10-20", "bytes=-0"])
def test_a_range_behind_the_end_is_refused(endpoint: Endpoint, bucket: str, asked: str) -> None:
    endpoint.server.client().put_object(Bucket=bucket, Key="ten", Body=bytes(10))
    status, headers, page = _ask(endpoint, "GET", f"/{bucket}/ten", Range=asked)
    assert (status, headers["Content-Range"]) == (416, "bytes */10")
    assert b"<Code>InvalidRange</Code>" in page
    assert b"<ActualObjectSize>10</ActualObjectSize>" in page


def test_a_part_is_read_by_its_number(endpoint: Endpoint, bucket: str) -> None:
    _upload(endpoint, bucket, "two", [b"first", b"second"])
    status, headers, data = _ask(endpoint, "GET", f"/{bucket}/two?partNumber=2")
    assert (status, data, headers["Content-Range"]) == (206, b"second", "bytes 5-10/11")
    assert headers["x-amz-mp-parts-count"] == "2"
    assert _ask(endpoint, "GET", f"/{bucket}/two?partNumber=3")[0] == 416


@pytest.mark.parametrize("sizes", [[], [10], [100_000], [70_000, 70_000, 1], [600_000, 1]])
@pytest.mark.parametrize("signed", ["", ";chunk-signature=00"])
@pytest.mark.parametrize("twice", [False, True])
def test_of_a_body_in_chunks_the_framing_is_not_kept(
    endpoint: Endpoint, bucket: str, sizes: list[int], signed: str, twice: bool
) -> None:
    data = random.Random(sum(sizes)).randbytes(sum(sizes))
    ends = list(itertools.accumulate(sizes))
    chunks = [data[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    framed = b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), signed.encode(), chunk) for chunk in chunks)
    framed += b"0%b\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n" % signed.encode()
    headers = {
        "Content_Encoding": "aws-chunked",
        "x_amz_decoded_content_length": str(len(data)),
        "x_amz_content_sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
        "x_amz_trailer": "x-amz-checksum-crc32",
    }
    if twice:
        framed = b"5\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (framed[:5], len(framed) - 5, framed[5:])
        headers["Transfer_Encoding"] = "chunked"
    else:
        headers["Content_Length"] = str(len(framed))
    assert _ask(endpoint, "PUT", f"/{bucket}/chunked", framed, **headers)[0] == 200
    assert _ask(endpoint, "GET", f"/{bucket}/chunked")[2] == data


def test_a_connection_lives_on_after_a_refusal(endpoint: Endpoint, bucket: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(endpoint.server.endpoint).netloc, timeout=60)
    with closing(connection):
        for method, path, status in [
            ("PUT", "/no-such-bucket/name", 404),
            ("PUT", f"/{bucket}/name?partNumber=1&uploadId=none", 404),
            ("PUT", f"/{bucket}/name?partNumber=x&uploadId=none", 400),
            ("PUT", f"/{bucket}/name?tagging", 501),
            ("PUT", f"/{bucket}/name", 200),
            ("HEAD", f"/{bucket}/name", 200),
            ("HEAD", f"/{bucket}/none", 404),
            ("GET", f"/{bucket}/name", 200),
        ]:
            connection.request(method, path, bytes(100_000) if method == "PUT" else None)
            answer = connection.getresponse()
            assert (answer.status, method == "GET") == (status, len(answer.read()) == 100_000), path


def test_a_body_held_back_is_asked_for(endpoint: Endpoint, bucket: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(endpoint.server.endpoint).netloc, timeout=60)
    with closing(connection):
        connection.putrequest("PUT", f"/{bucket}/name")
        connection.putheader("Content-Length", "4")
        connection.putheader("Expect", "100-continue")
        connection.endheaders()
        assert connection.sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.send(b"data")
        assert connection.getresponse().status == 200


def test_of_concurrent_creators_and_updaters_one_wins(endpoint: Endpoint, bucket: str) -> None:
    def race(**conditions: str) -> int:
        barrier = threading.Barrier(8)

        def attempt(racer: int) -> int:
            barrier.wait(timeout=60)
            return _ask(endpoint, "PUT", f"/{bucket}/raced", bytes([racer]) * 99_999, **conditions)[0]

        with ThreadPoolExecutor(8) as pool:
            statuses = sorted(pool.map(attempt, range(8)))
        assert statuses == [200] + [412] * 7
        (value,) = set(_ask(endpoint, "GET", f"/{bucket}/raced")[2])
        return value

    race(If_None_Match="*")
    race(If_Match=_ask(endpoint, "HEAD", f"/{bucket}/raced")[1]["ETag"])


@pytest.mark.parametrize(
    ("numbers", "code"), [([2, 1], "InvalidPartOrder"), ([1, 3], "InvalidPart"), ([], "MalformedXML")]
)
def test_an_upload_is_not_completed_with_the_wrong_parts(
    endpoint: Endpoint, bucket: str, numbers: list[int], code: str
) -> None:
    path = f"/{bucket}/wrong"
    page = _ask(endpoint, "POST", f"{path}?uploads")[2].decode()
    upload = page.partition("<UploadId>")[2].partition("<")[0]
    etags = {
        n: _ask(endpoint, "PUT", f"{path}?partNumber={n}&uploadId={upload}", b"data")[1]["ETag"]
        for n in (1, 2)
    }
    parts = (
        f"<Part><PartNumber>{number}</PartNumber><ETag>{etags.get(number, etags[1])}</ETag></Part>"
        for number in numbers
    )
    named = f"<CompleteMultipartUpload>{''.join(parts)}</CompleteMultipartUpload>".encode()
    status, _, refusal = _ask(endpoint, "POST", f"{path}?uploadId={upload}", named)
    assert (status, f"<Code>{code}</Code>" in refusal.decode()) == (400, True)
    client = endpoint.server.client()
    found = client.list_parts(Bucket=bucket, Key="wrong", UploadId=upload).get("Parts", [])
    assert [(part.get("PartNumber"), part.get("ETag")) for part in found] == sorted(etags.items())


def test_listings_come_in_pages(endpoint: Endpoint) -> None:
    client, bucket = endpoint.server.client(), endpoint.server.new_bucket()
    for key in ("a/1", "a/2", "b", "c/1", "d"):
        client.put_object(Bucket=bucket, Key=key)
        client.create_multipart_upload(Bucket=bucket, Key=key)
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=bucket, Delimiter="/", PaginationConfig={"PageSize": 1}
    )
    found = [
        [entry.get("Key") for entry in page.get("Contents", [])]
        + [entry.get("Prefix") for entry in page.get("CommonPrefixes", [])]
        for page in pages
    ]
    assert found == [["a/"], ["b"], ["c/"], ["d"]]
    uploads = client.get_paginator("list_multipart_uploads").paginate(
        Bucket=bucket, PaginationConfig={"PageSize": 2}
    )
    sizes = [[entry.get("Key") for entry in page.get("Uploads", [])] for page in uploads]
    assert sizes == [["a/1", "a/2"], ["b", "c/1"], ["d"]]


def test_a_copy_outlives_its_source(endpoint: Endpoint, bucket: str) -> None:
    client, data = endpoint.server.client(), random.Random(0).randbytes(100_000)
    client.put_object(Bucket=bucket, Key="a source", Body=data, Metadata={"step": "7"})
    client.copy_object(Bucket=bucket, Key="copy", CopySource={"Bucket": bucket, "Key": "a source"})
    client.put_object(Bucket=bucket, Key="a source", Body=bytes(100_000))
    found = client.get_object(Bucket=bucket, Key="copy")
    assert (found["Body"].read(), found["Metadata"]) == (data, {"step": "7"})


def test_memory_used_again_never_shows_in_what_is_read_meanwhile(endpoint: Endpoint, bucket: str) -> None:
    size, path = 8 * _MIB, f"/{bucket}/recycled"
    _ask(endpoint, "PUT", path, b"\0" * size)
    netloc = urlsplit(endpoint.server.endpoint).netloc
    with closing(http.client.HTTPConnection(netloc, timeout=60)) as slow:
        slow.connect()
        slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        slow.request("GET", path)
        answer = slow.getresponse()
        data = answer.read(1000)  # most of the rest waits in the server
        for value in range(1, 8):
            _ask(endpoint, "PUT", path, bytes([value]) * size)
            assert set(_ask(endpoint, "GET", path)[2]) == {value}
        data += answer.read()
    assert data == b"\0" * size


def test_memory_is_used_again_and_what_lies_idle_is_bounded() -> None:
    pool = Pool(most=2 * PIECE)
    block = pool.block(3 * PIECE - 1)
    views = list(block.views(0, block.size))
    for view in views:
        view[0] = 1
    del block
    others = [pool.block(PIECE - number) for number in range(3)]
    assert [next(other.views(0, 1))[0] for other in others] == [1, 1, 0]


def test_requests_and_bytes_are_counted_until_a_reset(endpoint: Endpoint, bucket: str) -> None:
    endpoint.reset()
    _upload(endpoint, bucket, "counted", [bytes(1000), bytes(500)])
    assert len(_ask(endpoint, "GET", f"/{bucket}/counted", Range="bytes=0-99")[2]) == 100
    assert _ask(endpoint, "HEAD", f"/{bucket}/counted")[1]["Content-Length"] == "1500"
    counts = endpoint.counts()
    assert counts.requests == {
        "CreateMultipartUpload": 1,
        "UploadPart": 2,
        "CompleteMultipartUpload": 1,
        "GetObject": 1,
        "HeadObject": 1,
    }
    assert 1500 < counts.received < 2500, "the parts, and the list of them"
    assert 100 < counts.sent < 2000, "the range, and two short documents"
    assert counts.cpu_seconds > 0
    endpoint.reset()
    assert endpoint.counts().requests == {}
    assert endpoint.counts().received == endpoint.counts().sent == 0


def test_discarded_bodies_keep_their_size() -> None:
    with served(discard=True) as endpoint:
        bucket = endpoint.server.new_bucket()
        _ask(endpoint, "PUT", f"/{bucket}/small", b"x" * SMALL)
        _upload(endpoint, bucket, "large", [b"x" * 20 * _MIB, b"x" * _MIB, b"small"])
        assert _ask(endpoint, "GET", f"/{bucket}/small")[2] == b"x" * SMALL
        assert _ask(endpoint, "GET", f"/{bucket}/large")[2] == bytes(21 * _MIB) + b"small"
        received = endpoint.counts().received
        assert received > 21 * _MIB
