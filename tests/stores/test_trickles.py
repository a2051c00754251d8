"""Answers and requests that go on for ever, by a byte now and then or without an end, are given up."""

from __future__ import annotations

import itertools
import re
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler

import pytest

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import StorageError
from cloudckpt.backends.stores.base import Upload
from cloudckpt.backends.stores.http.bounded import MOST
from cloudckpt.backends.stores.s3.store import S3Store
from support.answers import serving
from support.gcs import GCSServer
from support.proxy import MOST_PIECES, RawAnswer, Request, Sip, Spoiling, Trickle
from support.servers import S3Server
from support.spoilt import TRIED, Spoilt, spoilt

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


@pytest.fixture(scope="module", params=TRIED)
def place(request: pytest.FixtureRequest, moto: S3Server, gcs: GCSServer) -> Iterator[Spoilt]:
    with spoilt(request.param, moto, gcs, timeout=2.0) as made:
        yield made


_KIND = re.compile(r"kind([0-9]+)")


def test_answers_that_trickle_are_given_up(place: Spoilt) -> None:
    """All kinds at once, each for a name of its own: each takes a timeout or two."""
    place.store.list()  # what it needs for the first time
    kinds = list(_HEADS.items())

    def rule(request: Request) -> Spoiling:
        found = _KIND.search(request.target)
        return kinds[int(found[1])][1] if found else None

    def given_up(act: Callable[[str], object], number: int) -> str | None:
        try:
            act(f"kind{number}")
        except StorageError as error:
            return None if error.uri and error.hint else f"{kinds[number][0]}: {error!r}"
        return f"{kinds[number][0]}: a success"

    place.proxy.forget()
    place.proxy.rule(rule)
    store = place.store
    acts: list[Callable[[str], object]] = [store.list, store.get]
    with ThreadPoolExecutor(len(acts) * len(kinds)) as pool:
        tried = [pool.submit(given_up, act, number) for act in acts for number in range(len(kinds))]
        assert not [one.result() for one in tried if one.result()]
    counts = place.proxy.ended()
    assert counts and all(count < MOST_PIECES for count in counts), "the server ended it"


def test_an_objects_bytes_that_trickle_are_given_up(place: Spoilt) -> None:
    size = 1 << 20
    place.proxy.forget()
    place.spoil("GetRange", Trickle(_OK + b"Content-Length: %d\r\n\r\n" % size, b"d"))
    with pytest.raises(StorageError):
        place.store.read_into("name", 0, [memoryview(bytearray(size))])
    assert all(count < MOST_PIECES for count in place.proxy.ended())


@pytest.mark.parametrize("kind", _LONG)
def test_an_answer_without_an_end_takes_no_more_memory_than_an_answer_may(place: Spoilt, kind: str) -> None:
    place.proxy.forget()
    place.spoil("ListObjectsV2", _LONG[kind])
    tracemalloc.start()
    try:
        with pytest.raises(StorageError) as caught:
            place.store.list()
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
    place.proxy.forget()
    tokens = itertools.cycle("abc")
    pages = {
        "s3": "<ListBucketResult><Name>b</Name><IsTruncated>true</IsTruncated>"
        "<NextContinuationToken>{}</NextContinuationToken></ListBucketResult>",
        "gcs": '{{"kind": "storage#objects", "nextPageToken": "{}"}}',
    }
    form = pages["s3" if place.kind == "s3" else "gcs"]
    place.proxy.rule(lambda _: RawAnswer(_document(form.format(next(tokens)).encode())))
    with pytest.raises(StorageError, match="page") as caught:
        place.store.list()
    assert caught.value.uri == place.store.uri


def test_a_request_that_is_taken_byte_by_byte_is_given_up(place: Spoilt) -> None:
    place.proxy.forget()
    upload = place.store.begin_upload("sipped")
    place.spoil("UploadPart", Sip())
    with pytest.raises(StorageError):
        place.store.upload_part(upload, 1, 0, [memoryview(bytes(24 << 20))])
    assert place.proxy.sipped == [], "the server ended it"


def _document(body: bytes) -> bytes:
    return _OK + b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)
