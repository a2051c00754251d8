"""Answers and requests that go on for ever, by a byte now and then or without an end, are given up."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from cloudckpt.backends.errors import StorageError
from cloudckpt.backends.store import Upload
from cloudckpt.backends.stores.http.bounded import MOST
from cloudckpt.backends.stores.s3 import S3Store
from cloudckpt.backends.target import Target
from support.answers import serving
from support.foreign import OPERATIONS
from support.gcs import GCSServer
from support.proxy import MOST_PIECES, RawAnswer, Sip, Trickle
from support.servers import S3Server
from support.spoilt import STORES, Spoilt, spoilt

_OK = b'HTTP/1.1 200 OK\r\nETag: "x"\r\n'
_XML = b"Content-Type: application/xml\r\n"
_CHUNKED = _OK + _XML + b"Transfer-Encoding: chunked\r\n\r\n"
_ZEROS = bytes(1 << 20)
_HEADS = {
    "a status line": Trickle(b"HTTP/1.1 200 ", b"O"),
    "a header": Trickle(_OK + b"X-Long: ", b"a"),
    "headers": Trickle(_OK, b"X: y\r\n"),
    "answers to go on": Trickle(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a document": Trickle(_OK + _XML + b"Content-Length: 9999\r\n\r\n"),
    "a document in chunks": Trickle(_CHUNKED, b"1\r\n \r\n"),
    "an error": Trickle(b"HTTP/1.1 403 No\r\nContent-Length: 9999\r\n\r\n"),
}
"""Heads and small answers that trickle, by what does."""
_LONG = {
    "a promised length": Trickle(_OK + _XML + b"Content-Length: 99999999999\r\n\r\n", _ZEROS, 0.0),
    "no length": Trickle(_OK + _XML + b"\r\n", _ZEROS, 0.0),
    "chunks": Trickle(_CHUNKED, b"100000\r\n" + _ZEROS + b"\r\n", 0.0),
    "an error": Trickle(b"HTTP/1.1 403 No\r\n\r\n", _ZEROS, 0.0),
    "headers": Trickle(_OK, b"X: " + b"y" * 1000 + b"\r\n", 0.0),
    "lines of chunks": Trickle(_CHUNKED, b"1" * 1000, 0.0),
}
"""Documents of gigabytes, by how they are sent."""


@pytest.fixture(scope="module", params=STORES)
def place(request: pytest.FixtureRequest, moto: S3Server, gcs: GCSServer) -> Iterator[Spoilt]:
    with spoilt(request.param, moto, gcs, timeout=0.6) as made:
        yield made


@pytest.mark.parametrize("kind", _HEADS)
@pytest.mark.parametrize("operation", ["ListObjectsV2", "GetObject", "HeadObject", "PutObject"])
def test_an_answer_that_trickles_is_given_up(place: Spoilt, operation: str, kind: str) -> None:
    made = place.stage()
    place.spoil(operation, _HEADS[kind])
    with pytest.raises(StorageError) as caught:
        OPERATIONS[operation](made)
    assert caught.value.uri == place.store.uri and caught.value.hint
    assert all(count < MOST_PIECES for count in place.proxy.ended()), "the server ended it"


def test_an_objects_bytes_that_trickle_are_given_up(place: Spoilt) -> None:
    made = place.stage()
    size = 1 << 20
    place.spoil("GetRange", Trickle(_OK + b"Content-Length: %d\r\n\r\n" % size, b"d"))
    with pytest.raises(StorageError):
        made.store.read_into("name", 0, [memoryview(bytearray(size))])
    assert all(count < MOST_PIECES for count in place.proxy.ended())


@pytest.mark.parametrize("size", [4 << 20, 24 << 20])
def test_a_request_that_is_taken_byte_by_byte_is_given_up(place: Spoilt, size: int) -> None:
    made = place.stage()
    upload = made.store.begin_upload("sipped")
    place.spoil("UploadPart", Sip())
    with pytest.raises(StorageError):
        made.store.upload_part(upload, 1, 0, [memoryview(bytes(size))])
    assert all(count < MOST_PIECES for count in place.proxy.ended())


@pytest.mark.parametrize("kind", _LONG)
@pytest.mark.parametrize("operation", ["ListObjectsV2", "CompleteMultipartUpload", "DeleteObjects"])
def test_an_answer_without_an_end_takes_no_more_memory_than_an_answer_may(
    place: Spoilt, operation: str, kind: str
) -> None:
    made = place.stage()
    place.spoil(operation, _LONG[kind])
    tracemalloc.start()
    try:
        with pytest.raises(StorageError) as caught:
            OPERATIONS[operation](made)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.uri == place.store.uri and caught.value.hint
    assert peak < 6 * MOST
    assert all(count < MOST_PIECES for count in place.proxy.ended())


class _HalfAnswer(BaseHTTPRequestHandler):
    """Begins to say that the body may be sent, and ends the connection."""

    protocol_version = "HTTP/1.1"

    def handle_expect_100(self) -> bool:
        self.wfile.write(b"HTTP/1.1 100 Continue\r\nX: y\r\n")
        self.close_connection = True
        return False

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in the base class
        """Stay silent."""


class _EndlessLine(_HalfAnswer):
    """Says whether the body may be sent, in a line without an end."""

    def handle_expect_100(self) -> bool:
        self.wfile.write(b"HTTP/1.1 100 Continue" + b" " * (40 << 20))
        return False


@pytest.mark.parametrize("handler", [_HalfAnswer, _EndlessLine])
def test_half_an_answer_to_expect_is_an_error(handler: type[BaseHTTPRequestHandler]) -> None:
    """botocore reads its headers until a blank line, also after the end of the connection."""
    keys = {"key": "test", "secret": "testtest"}
    with serving(handler) as endpoint:
        options = {"endpoint_url": endpoint, "region": "us-east-1", "checksum": "none", "retries": 0}
        target = Target.parse("s3://bucket/run", storage_options=keys, timeout=2.0, **options)
        with S3Store(target) as store, pytest.raises(StorageError) as caught:
            store.upload_part(Upload("name", "1"), 1, 0, [memoryview(bytes(9 << 20))])
    assert caught.value.hint


def test_a_listing_that_goes_in_circles_is_an_error(place: Spoilt) -> None:
    """Each page leads on to another one, which was there before."""
    made = place.stage()
    tokens = itertools.cycle("abc")
    pages = {
        "s3": "<ListBucketResult><Name>b</Name><IsTruncated>true</IsTruncated>"
        "<NextContinuationToken>{}</NextContinuationToken></ListBucketResult>",
        "gcs": '{{"kind": "storage#objects", "nextPageToken": "{}"}}',
    }
    form = pages["s3" if place.kind == "s3" else "gcs"]
    place.proxy.rule(lambda _: RawAnswer(_document(form.format(next(tokens)).encode())))
    with pytest.raises(StorageError, match="page") as caught:
        made.store.list()
    assert caught.value.uri == place.store.uri


def _document(body: bytes) -> bytes:
    return _OK + b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)
