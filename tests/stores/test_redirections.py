"""Redirections: no request goes to another host than the store's, but into the region of an S3 bucket."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

import pytest

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointError, StorageError
from cloudckpt.backends.stores.base import Upload
from cloudckpt.backends.stores.s3.store import S3Store
from support.answers import serving
from support.foreign import OPERATIONS
from support.gcs import GCSServer
from support.proxy import AddHeaders, RawAnswer, Request, Rule
from support.servers import S3Server
from support.spoilt import TOKEN, TRIED, Spoilt, is_of, spoilt

_REDIRECTIONS = (
    *((status, "") for status in (301, 302, 303, 307, 308)),
    (301, "x-amz-bucket-region: eu-north-1\r\n"),
)
_EVIL_REGIONS = ("evil", "127.0.0.1", "evil.example/", "x@evil.example", "evil.example#", "a:80", "..", "")


@contextmanager
def _trap() -> Iterator[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """Run a server that keeps what it is sent, and answers with success; yield its URL and the requests."""
    seen: list[tuple[str, dict[str, str]]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def handle_all(self) -> None:
            with lock:
                seen.append((f"{self.command} {self.path}", dict(self.headers.items())))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_CONNECT = handle_all  # noqa: N815 - http.server's

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in the base class
            """Stay silent."""

    with serving(Handler) as url:
        yield url, seen


@pytest.fixture(scope="module", params=TRIED)
def place(request: pytest.FixtureRequest, moto: S3Server, gcs: GCSServer) -> Iterator[Spoilt]:
    with spoilt(request.param, moto, gcs) as made:
        yield made


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # botocore leaves connections
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_redirection_of_an_operation_is_followed_to_another_host(place: Spoilt, operation: str) -> None:
    if place.kind == "gcs sessions" and operation == "ListMultipartUploads":
        pytest.skip("GCS lists no sessions")
    with _trap() as (url, seen):
        for status, more in _REDIRECTIONS:
            made = place.stage()
            head = f"HTTP/1.1 {status} Elsewhere\r\nLocation: {url}/run/name?a=b\r\n{more}"
            place.spoil(operation, f"{head}Connection: close\r\nContent-Length: 0\r\n\r\n".encode())
            if operation == "CopyObject":  # there are other ways to copy
                with contextlib.suppress(StorageError):
                    assert made.store.copy_from(made.source, made.source.stat("copied")) is None
            else:
                with pytest.raises(CheckpointError) as caught:
                    OPERATIONS[operation](made)
                assert caught.value.uri is not None
            assert any(is_of(place.kind, one, operation) for one in place.proxy.all())
            assert not seen, f"{status} sent {seen[0]}"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # botocore leaves connections
def test_a_server_that_redirects_everything_is_soon_given_up(place: Spoilt) -> None:
    """botocore looks for the region of a bucket by HeadBucket, and for that of HeadBucket likewise."""
    made = place.stage()
    with _trap() as (url, seen):
        answer = f"HTTP/1.1 301 X\r\nLocation: {url}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        document = b"<Error><Code>PermanentRedirect</Code><Message>m</Message></Error>"
        coded = answer.replace("Content-Length: 0", f"Content-Length: {len(document)}").encode() + document
        for raw in (answer.encode(), coded):
            before = place.proxy.count
            place.proxy.rule(_always(raw))
            with pytest.raises(StorageError):
                made.store.list()
            assert place.proxy.count - before <= 3
        assert not seen


def _always(answer: bytes) -> Rule:
    return lambda _: RawAnswer(answer)


@pytest.mark.parametrize("region", _EVIL_REGIONS)
def test_a_region_of_an_answer_leads_to_no_host_but_those_of_s3(
    monkeypatch: pytest.MonkeyPatch, region: str
) -> None:
    """The requests of a store without an endpoint go to a proxy, which sees the hosts that they are for."""
    hosts: list[tuple[str, str]] = []

    class AsAWS(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hosts.append((self.path, str(dict(self.headers.items()))))
            self.send_response(301)
            self.send_header("x-amz-bucket-region", region)
            self.send_header("Location", "http://evil.example/")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815 - http.server's names

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in the base class
            """Stay silent."""

    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(AsAWS) as url:
        monkeypatch.setenv("HTTP_PROXY", url)
        monkeypatch.setenv("http_proxy", url)
        given = {"key": "k", "secret": "s", "token": TOKEN, "use_ssl": False}
        target = Target.parse("s3://bucket/run", region="us-east-1", retries=0, storage_options=given)
        with S3Store(target) as store:
            for act in (store.list, lambda: store.stat("name"), lambda: store.get("name")):
                with pytest.raises(CheckpointError):
                    act()
    assert hosts and all(TOKEN in headers for _, headers in hosts)
    for where, _ in hosts:
        host = urlsplit(where).hostname or ""
        assert host.endswith(".amazonaws.com") and ".s3." in f".{host}", where


def test_a_bucket_is_followed_into_its_region_of_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts: list[str] = []

    class AsAWS(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            hosts.append(urlsplit(self.path).hostname or "")
            is_there = ".eu-north-1." in hosts[-1]
            self.send_response(200 if is_there else 301)
            self.send_header("x-amz-bucket-region", "eu-north-1")
            self.send_header("ETag", '"x"')
            self.send_header("Content-Length", "4" if is_there else "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in the base class
            """Stay silent."""

    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(AsAWS) as url:
        monkeypatch.setenv("HTTP_PROXY", url)
        monkeypatch.setenv("http_proxy", url)
        given = {"key": "k", "secret": "s", "use_ssl": False}
        target = Target.parse("s3://bucket/run", region="eu-west-1", retries=0, storage_options=given)
        with S3Store(target) as store:
            assert store.stat("name").size == 4
    assert hosts == ["bucket.s3.eu-west-1.amazonaws.com", "bucket.s3.eu-north-1.amazonaws.com"]


@pytest.fixture(scope="module")
def sessions(moto: S3Server, gcs: GCSServer) -> Iterator[Spoilt]:
    with spoilt("gcs sessions", moto, gcs) as made:
        yield made


_ELSEWHERE = (
    "{trap}",
    "http://user@{here}",
    "https://{here}",
    "http://{here}@{there}",
    "http:\\\\{there}",
    "//{there}",
)


@pytest.mark.parametrize("form", _ELSEWHERE)
def test_the_url_of_a_session_that_leads_elsewhere_is_refused(sessions: Spoilt, form: str) -> None:
    sessions.stage()
    with _trap() as (trap, seen):
        here, there = (urlsplit(one).netloc for one in (sessions.proxy.endpoint, trap))
        url = form.format(trap=trap, here=here, there=there) + "/upload/storage/v1/b/x/o?upload_id=1"
        sessions.spoil("CreateMultipartUpload", AddHeaders({"Location": url}))
        with pytest.raises(StorageError) as caught:
            sessions.store.begin_upload("name")
        assert caught.value.hint and caught.value.uri == sessions.store.uri
        assert not seen


def test_an_upload_that_was_planted_leads_to_no_request_elsewhere(sessions: Spoilt) -> None:
    """Other processes find uploads in the store, where anybody may have put them."""
    sessions.stage()
    with _trap() as (trap, seen):
        planted = Upload("name", f"{trap}/upload/storage/v1/b/x/o?upload_id=1")
        with pytest.raises(StorageError, match="nothing was sent"):
            sessions.store.abort_upload(planted)
        with pytest.raises(StorageError, match="nothing was sent"):
            sessions.store.upload_part(planted, 1, 0, [memoryview(bytes(256 << 10))])
        assert not sessions.store.is_pending(planted)
        assert not seen


def test_requests_to_a_place_carry_its_session_token_and_no_other(moto: S3Server, gcs: GCSServer) -> None:
    """The tests above would notice a token that is sent: it is in every request to the server itself."""
    with spoilt("s3", moto, gcs) as made:
        made.stage()
        seen: list[Request] = [*made.proxy.all()]
    assert seen and all(one.headers["x-amz-security-token"] == TOKEN for one in seen)
