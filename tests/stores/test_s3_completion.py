"""Completions made after a pattern are what botocore would send, on connections as careful as its own."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import re
import shutil
import ssl
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from botocore import exceptions as boto
from botocore.config import Config

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import AccessDeniedError, StorageError
from cloudckpt.backends.stores.base import Part, Upload
from cloudckpt.backends.stores.s3.connections import Connections
from cloudckpt.backends.stores.s3.errors import status_of
from cloudckpt.backends.stores.s3.store import S3Store
from support.answers import serving
from support.as_aws import elsewhere, in_region
from support.buckets import Bucket, open_in, send
from support.certificate import self_signed
from support.proxy import Answer, Proxy, Request, Rule, proxied
from support.servers import S3Server

_OPERATION = "CompleteMultipartUpload"
_NAME = "__0_ü&é %20+=(~).distcp"
_PARTS = [Part(2, 4, '"e<t>&ag"', "crc64nvme:AAAAAAAAAP8="), Part(1, 5 << 20, "plain", None)]
_OF_THE_MOMENT = ("authorization", "x-amz-date", "amz-sdk-invocation-id", "amz-sdk-request")
"""Headers that no two requests of botocore have in common."""
_USUAL = Config(connect_timeout=5, read_timeout=5, max_pool_connections=2)


def _requests_put_together(store: S3Store) -> Counter[str]:
    """Count what botocore puts together from now on, by operation."""
    counted: Counter[str] = Counter()

    def count(model: Any, **_: Any) -> None:
        counted[model.name] += 1

    store._requests.clients.patient.meta.events.register("before-call", count)
    return counted


def _redirected(region: str) -> Rule:
    """Send on what was signed for another region."""
    refuse, send_on = in_region(region), elsewhere(region)
    return lambda request: send_on(request) if isinstance(refuse(request), Answer) else None


def _content(request: Request) -> Any:
    """All of a request that stays the same when it is made again."""
    headers = {name: value for name, value in request.headers.items() if name not in _OF_THE_MOMENT}
    body = ET.canonicalize(request.body.decode())
    signed = re.findall(r"(Credential=[^,]*|SignedHeaders=[^,]*)", request.headers.get("authorization", ""))
    assert int(headers.pop("content-length")) == len(request.body)
    headers.pop("x-amz-content-sha256", None)  # of the body's bytes, which may declare themselves as XML
    return request.method, request.target, headers, body, signed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"requester_pays": True},
        {"storage_options": {"anon": True}},
        {"storage_options": {"key": "k", "secret": "s", "token": "a token"}},
        {"storage_options": {"key": "k", "secret": "s", "config_kwargs": {"user_agent": "mine"}}},
        {
            "storage_options": {
                "key": "k",
                "secret": "s",
                "s3_additional_kwargs": {"ExpectedBucketOwner": "111122223333"},
            }
        },
    ],
    ids=["plain", "requester pays", "anonymous", "token", "agent", "owner"],
)
def test_a_completion_is_the_request_that_botocore_makes(
    proxy: Proxy, bucket: Bucket, options: dict[str, Any]
) -> None:
    proxy.rule(lambda request: Answer(403, "AccessDenied") if request.operation == _OPERATION else None)
    with open_in(proxy, bucket, **options) as store:
        counted = _requests_put_together(store)
        with pytest.raises(AccessDeniedError):
            store.complete_upload(Upload("another", "of an upload"), _PARTS)
        with pytest.raises(AccessDeniedError):
            store.complete_upload(Upload(_NAME, "an id/+ü=&"), _PARTS)
        assert counted == {_OPERATION: 1}
        clients = store._requests.clients
        listed = [
            {"PartNumber": 1, "ETag": "plain"},
            {"PartNumber": 2, "ETag": '"e<t>&ag"', "ChecksumCRC64NVME": "AAAAAAAAAP8="},
        ]
        arguments = clients.arguments(
            "complete_multipart_upload",
            Bucket=bucket.name,
            Key=f"run/{_NAME}",
            UploadId="an id/+ü=&",
            MultipartUpload={"Parts": listed},
        )
        with pytest.raises(boto.ClientError) as refused:
            clients.patient.complete_multipart_upload(**arguments)
        with pytest.raises(boto.ClientError) as ours:
            clients.completion(**arguments)
    _, after_a_pattern, by_botocore, again = proxy.seen(_OPERATION)
    assert _content(after_a_pattern) == _content(by_botocore) == _content(again)
    assert type(ours.value) is type(refused.value)
    assert str(ours.value) == str(refused.value).replace(" (reached max retries: 0)", "")
    said, theirs = (dict(error.value.response) for error in (ours, refused))
    assert said["Error"] == theirs["Error"]
    assert status_of(ours.value) == 403


class _Sent(Exception):
    """Raised instead of sending."""


@pytest.mark.parametrize(
    ("bucket", "endpoint", "of_s3"),
    [
        ("bucket", None, {}),
        ("bucket.with.dots", None, {}),
        ("bucket", None, {"use_accelerate_endpoint": True}),
        ("bucket", None, {"use_dualstack_endpoint": True}),
        ("bucket", "https://storage.example:8443", {"addressing_style": "virtual"}),
        ("bucket", "https://storage.example/below", {"addressing_style": "path"}),
        ("arn:aws:s3:us-west-2:111122223333:accesspoint/mine", None, {}),
    ],
)
def test_the_signature_is_that_of_botocore_wherever_a_bucket_is(
    monkeypatch: pytest.MonkeyPatch, bucket: str, endpoint: str | None, of_s3: dict[str, Any]
) -> None:
    sent: list[tuple[str, dict[str, str]]] = []

    def note(url: str, headers: Mapping[str, Any]) -> None:
        text = {name.lower(): v.decode() if isinstance(v, bytes) else v for name, v in headers.items()}
        sent.append((url, text))
        raise _Sent

    monkeypatch.setattr(Connections, "post", lambda _, url, headers, __: note(url, headers))
    options: dict[str, Any] = {"key": "k", "secret": "s", "config_kwargs": {"s3": of_s3}}
    target = Target.parse("s3://any", region="us-east-1", endpoint_url=endpoint, storage_options=options)
    listed = {"Parts": [{"PartNumber": 1, "ETag": "plain"}]}
    arguments = {"Bucket": bucket, "Key": f"run/{_NAME}", "UploadId": "id", "MultipartUpload": listed}
    with S3Store(target) as store:
        clients = store._requests.clients
        clients.patient.meta.events.register(
            "before-send", lambda request, **_: note(request.url, request.headers)
        )
        for complete in [clients.completion, clients.patient.complete_multipart_upload] * 10:
            with pytest.raises(_Sent):
                complete(**arguments)
    # A signature holds the second in which it was made.
    pairs = [
        (ours, theirs)
        for ours, theirs in itertools.pairwise(sent)
        if ours[1]["x-amz-date"] == theirs[1]["x-amz-date"]
    ]
    assert pairs
    for (url, headers), (their_url, their_headers) in pairs:
        assert url == their_url
        assert headers["authorization"] == their_headers["authorization"]


def test_botocore_answers_as_it_would(s3_server: S3Server) -> None:
    bucket = Bucket.new(s3_server)
    with proxied(s3_server.endpoint) as proxy, open_in(proxy, bucket) as store:
        answers = []
        for complete in (
            lambda given: store._requests.clients.patient.complete_multipart_upload(**given),
            lambda given: store._requests.clients.completion(**given),
        ):
            upload = store.begin_upload("name")
            part = store.upload_part(upload, 1, 0, [memoryview(b"data")])
            listed = {"Parts": [{"PartNumber": 1, "ETag": part.etag}]}
            own = {"Key": "run/name", "UploadId": upload.upload_id, "MultipartUpload": listed}
            answers.append(complete({"Bucket": bucket.name, **own}))
            assert bucket.found() == b"data"
    theirs, ours = ({**answer} for answer in answers)
    for answer in (theirs, ours):
        facts = answer.pop("ResponseMetadata")
        assert facts["HTTPStatusCode"] == 200
        assert facts["HTTPHeaders"]
    assert ours == theirs


@pytest.mark.parametrize("rule", [in_region, _redirected])
def test_a_pattern_follows_its_bucket_into_another_region(
    moto: S3Server, rule: Callable[[str], Rule]
) -> None:
    bucket = Bucket.new(moto)
    with proxied(moto.endpoint) as proxy, open_in(proxy, bucket, retries=0, region="eu-west-1") as store:
        send(store)
        send_on = rule("eu-north-1")
        proxy.rule(lambda request: send_on(request) if request.operation == _OPERATION else None)
        send(store)
        send(store)
    signed = [request.headers["authorization"].split("/")[2] for request in proxy.seen(_OPERATION)]
    # Once before; as the pattern has it, as botocore does, and where it is sent; and then at once.
    assert signed == ["eu-west-1", *["eu-west-1"] * 2, "eu-north-1", "eu-north-1"]


def test_each_bucket_has_a_pattern_of_its_own(moto: S3Server) -> None:
    buckets = [Bucket.new(moto), Bucket.new(moto)]
    with (
        proxied(moto.endpoint) as proxy,
        open_in(proxy, buckets[0]) as one,
        open_in(proxy, buckets[1]) as other,
    ):
        for index, store in enumerate((one, other, one, other)):
            send(store, bytes([index]))
        assert one._requests.clients is other._requests.clients
    assert [bucket.found() for bucket in buckets] == [b"\2", b"\3"]


def test_many_threads_complete_at_once(moto: S3Server) -> None:
    bucket = Bucket.new(moto)
    with proxied(moto.endpoint) as proxy, open_in(proxy, bucket) as store:

        def whole(index: int) -> None:
            upload = store.begin_upload(f"name-{index}")
            store.complete_upload(upload, [store.upload_part(upload, 1, 0, [memoryview(b"%d" % index)])])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(whole, range(64)))
        assert {int(store.get(info.name)[0]) for info in store.list().objects} == set(range(64))


def test_through_a_proxy_botocore_completes(
    proxy: Proxy, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy.endpoint)
    monkeypatch.setenv("no_proxy", "localhost")
    behind = S3Store(
        Target.parse(
            f"s3://{bucket.name}/run",
            endpoint_url="http://bucket.invalid",
            region="us-east-1",
            storage_options={"key": "k", "secret": "s"},
            retries=0,
        )
    )
    with behind, pytest.raises(StorageError):
        behind.complete_upload(Upload("name", "id"), _PARTS[1:])
    (asked,) = proxy.seen(_OPERATION)
    assert asked.target.startswith("http://bucket.invalid/")


@pytest.fixture
def trusted(tmp_path: Path) -> tuple[ssl.SSLContext, Path]:
    return self_signed(tmp_path)


_URL = "/bucket/name?uploadId=1"


def test_a_certificate_that_nobody_vouches_for_is_refused(
    moto: S3Server, trusted: tuple[ssl.SSLContext, Path], tmp_path: Path
) -> None:
    context, certificate = trusted
    folder = tmp_path / "authorities"
    folder.mkdir()
    with proxied(moto.endpoint, context) as proxy:
        url = f"{proxy.endpoint}{_URL}"
        for careful in (Connections(_USUAL, True), Connections(_USUAL, str(folder))):
            with pytest.raises(boto.SSLError):
                careful.post(url, {}, b"")
        assert not proxy.all()
        asked = f"https://localhost:{url.split(':')[2]}"
        other_name = Connections(_USUAL, str(certificate))
        with pytest.raises(boto.SSLError):  # it is for 127.0.0.1
            other_name.post(asked, {}, b"")
        assert not proxy.all()
        command = ["openssl", "x509", "-hash", "-noout", "-in", str(certificate)]
        hashed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        shutil.copy(certificate, folder / f"{hashed}.0")
        for verify in (str(certificate), str(folder)):
            trusting = Connections(_USUAL, verify)
            assert trusting.post(url, {}, b"").status >= 400
            trusting.close()


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
@pytest.mark.parametrize("given", [{}, {"verify": None}], ids=["nothing", "none"])
def test_the_authorities_of_the_environment_are_trusted(
    moto: S3Server,
    trusted: tuple[ssl.SSLContext, Path],
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    variable: str,
) -> None:
    context, certificate = trusted
    monkeypatch.setenv(variable, str(certificate))
    bucket, options = Bucket.new(moto), {"key": "test", "secret": "testtest", "client_kwargs": given}
    with (
        proxied(moto.endpoint, context) as proxy,
        open_in(proxy, bucket, storage_options=options) as store,
    ):
        counted = _requests_put_together(store)
        send(store)
        send(store, b"again")
        assert counted == {_OPERATION: 1}
    assert bucket.found() == b"again"


def test_without_verification_botocore_completes(
    moto: S3Server, trusted: tuple[ssl.SSLContext, Path], recwarn: pytest.WarningsRecorder
) -> None:
    bucket = Bucket.new(moto)
    careless = {"key": "test", "secret": "testtest", "client_kwargs": {"verify": False}}
    with (
        proxied(moto.endpoint, trusted[0]) as proxy,
        open_in(proxy, bucket, storage_options=careless) as store,
        pytest.warns(Warning, match="Unverified HTTPS request"),
    ):
        send(store)
    assert bucket.found() == b"data"
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]


class _Closing(http.server.BaseHTTPRequestHandler):
    """Counts connections, answers, and closes the first connection without having said so."""

    protocol_version = "HTTP/1.1"
    connections = 0
    closed: threading.Event

    def setup(self) -> None:
        super().setup()
        type(self).connections += 1

    def finish(self) -> None:
        super().finish()
        self.connection.close()
        self.closed.set()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.close_connection = self.connections == 1

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        pass


def test_a_connection_is_kept_until_the_server_closes_it() -> None:
    _Closing.connections, _Closing.closed = 0, threading.Event()
    with serving(_Closing) as endpoint, contextlib.closing(Connections(_USUAL, True)) as connections:
        assert connections.post(f"{endpoint}{_URL}", {}, b"body").status == 200
        assert _Closing.closed.wait(10)
        for _ in range(3):
            assert connections.post(f"{endpoint}{_URL}", {}, b"body").status == 200
        assert _Closing.connections == 2


def test_where_nothing_listens_the_endpoint_cannot_be_reached() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Closing) as server:
        free = server.server_port
    with pytest.raises(boto.EndpointConnectionError):
        Connections(_USUAL, True).post(f"http://127.0.0.1:{free}{_URL}", {}, b"")
    with pytest.raises(boto.EndpointConnectionError):
        Connections(_USUAL, True).post(f"http://nowhere.invalid{_URL}", {}, b"")


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", boto.ConnectionClosedError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhalf", boto.ConnectionClosedError),
        (b"\x15\x03\x01\x00\x02", boto.ConnectionClosedError),
        (None, boto.ReadTimeoutError),
    ],
    ids=["closed", "cut short", "no HTTP", "silent"],
)
def test_what_a_connection_does_is_raised_as_botocore_would(
    said: bytes | None, error: type[Exception]
) -> None:
    impatient = _USUAL.merge(Config(read_timeout=0.3))
    answered = threading.Event()

    class Odd(_Closing):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.close_connection = True
            if said is None:
                answered.wait(10)
            else:
                self.wfile.write(said)

    Odd.closed = threading.Event()
    with serving(Odd) as endpoint:
        with pytest.raises(error) as caught:
            Connections(impatient, True).post(f"{endpoint}{_URL}", {}, b"body")
        assert type(caught.value) is error
        answered.set()
