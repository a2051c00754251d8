"""Both stores send every request through the proxy that is set, and errors name it without its password."""

from __future__ import annotations

import base64
import contextlib
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

import pytest

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointError, ConfigurationError, StorageError
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import ObjectStore, Overwrite, Upload
from support.answers import serving
from support.gcs import GCSServer
from support.proxy import Answer, Request, SendAs, Spoiling, proxied
from support.servers import S3Server, unused_port

_KINDS = ("s3", "gs")
_HOST = "store.invalid"
_USER = "me:canary"
_CALLS: dict[str, Callable[[ObjectStore], object]] = {
    "list": lambda store: store.list(),
    "put": lambda store: store.put("name", b"data", Overwrite()),
    "get": lambda store: store.stat("name"),
}
every_call = pytest.mark.parametrize("call", _CALLS)
every_store = pytest.mark.parametrize("kind", _KINDS)
every_scheme = pytest.mark.parametrize("scheme", ["http", "https"])


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def _open(kind: str, endpoint: str, bucket: str = "bucket", **more: Any) -> ObjectStore:
    options: dict[str, Any] = {"anon": True}
    if kind == "s3":
        options = {"region": "us-east-1", "storage_options": {"key": "test", "secret": "testtest"}}
    return open_store(
        Target.parse(f"{kind}://{bucket}/run", endpoint_url=endpoint, **{"retries": 2, **options, **more})
    )


def _error(kind: str, endpoint: str, call: str, **more: Any) -> CheckpointError:
    with _open(kind, endpoint, **more) as store, pytest.raises(CheckpointError) as caught:
        _CALLS[call](store)
    assert caught.value.uri == f"{kind}://bucket/run"
    assert "canary" not in str(caught.value)
    return caught.value


@contextlib.contextmanager
def _answering(status: int) -> Iterator[str]:
    """Run a proxy that answers every request, CONNECT included, with a status; yields host and port."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_error(status)

        do_CONNECT = do_GET = do_PUT = do_POST = do_HEAD = answer  # noqa: N815 - http.server looks them up

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in the base class
            """Stay silent."""

    with serving(Handler) as url:
        yield urlsplit(url).netloc


@contextlib.contextmanager
def _silent() -> Iterator[str]:
    """Yield host and port of a listener whose queue is full, so that the kernel drops attempts to connect."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@every_store
@every_call
@every_scheme
@pytest.mark.parametrize("upper", [True, False])
def test_a_proxy_that_refuses_is_named_with_its_variable(
    monkeypatch: pytest.MonkeyPatch, kind: str, call: str, scheme: str, upper: bool
) -> None:
    port, name = unused_port(), f"{scheme}_proxy"
    name = name.upper() if upper else name
    monkeypatch.setenv(name, f"http://{_USER}@127.0.0.1:{port}")
    error = _error(kind, f"{scheme}://{_HOST}:9000", call)
    assert isinstance(error, StorageError)
    told = f"the proxy http://127.0.0.1:{port} ({name}) refused the connection"
    assert error.message == f"cannot reach the endpoint {scheme}://{_HOST}:9000: {told}"
    assert f"unset {name}, or add {_HOST} to NO_PROXY" in (error.hint or "")


@every_store
@every_call
@every_scheme
def test_a_proxy_whose_name_does_not_resolve_is_named(
    monkeypatch: pytest.MonkeyPatch, kind: str, call: str, scheme: str
) -> None:
    monkeypatch.setenv(f"{scheme}_proxy", f"{_USER}@proxy.invalid:3128")  # without a scheme
    error = _error(kind, f"{scheme}://{_HOST}:9000", call)
    told = f"the proxy http://proxy.invalid:3128 ({scheme}_proxy) has a name that does not resolve"
    assert told in error.message and "NO_PROXY" in (error.hint or "")


@every_store
@pytest.mark.parametrize("call", ["list", "put"])
@every_scheme
def test_a_proxy_that_takes_no_connection_in_time_is_named(
    monkeypatch: pytest.MonkeyPatch, kind: str, call: str, scheme: str
) -> None:
    with _silent() as at:
        monkeypatch.setenv(f"{scheme}_proxy", f"http://{_USER}@{at}")
        error = _error(kind, f"{scheme}://{_HOST}:9000", call, timeout=0.3)
    assert f"the proxy http://{at} ({scheme}_proxy) did not answer" in error.message


@every_store
@every_call
@every_scheme
@pytest.mark.parametrize("status", [403, 407, 502])
def test_a_proxy_that_refuses_to_pass_a_request_on_is_named(
    monkeypatch: pytest.MonkeyPatch, kind: str, call: str, scheme: str, status: int
) -> None:
    with _answering(status) as at:
        monkeypatch.setenv(f"{scheme}_proxy", f"http://{_USER}@{at}")
        error = _error(kind, f"{scheme}://{_HOST}:9000", call, retries=1)
    assert f"http://{at} ({scheme}_proxy)" in str(error)
    assert str(status) in error.message or (kind, scheme, status) == ("gs", "http", 403)
    assert f"unset {scheme}_proxy, or add {_HOST} to NO_PROXY" in (error.hint or "")


@every_store
@every_call
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (f"socks5://{_USER}@127.0.0.1:1080", "socks5://127.0.0.1:1080 of https_proxy is not supported"),
        (f"http://{_USER}@proxy:port", "the proxy of https_proxy has a malformed host or port"),
        (f"http://{_USER}@:3128", "the proxy of https_proxy has no host"),
    ],
)
def test_a_proxy_that_can_not_be_used_is_refused_before_any_request(
    monkeypatch: pytest.MonkeyPatch, kind: str, call: str, given: str, said: str
) -> None:
    monkeypatch.setenv("https_proxy", given)
    error = _error(kind, f"https://{_HOST}:9000", call)
    assert isinstance(error, ConfigurationError) and said in error.message
    assert "Set https_proxy" in (error.hint or "")


@every_store
def test_all_proxy_is_not_used_and_an_unreachable_endpoint_says_so(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    error = _error(kind, f"http://127.0.0.1:{unused_port()}", "put")
    assert "refused the connection" in error.message
    assert "ALL_PROXY is set and is not used" in (error.hint or "")


def _forwarding(seen: list[str]) -> Callable[[Request], Spoiling]:
    """Return the rule of a forward proxy that wants a password, and note the paths that it passes on."""
    wanted = f"Basic {base64.b64encode(_USER.encode()).decode()}"

    def decide(request: Request) -> Spoiling:
        parts = urlsplit(request.target)
        if request.headers.get("proxy-authorization") != wanted or not parts.netloc:
            return Answer(407)
        seen.append(parts.path)
        return SendAs(parts.path + (f"?{parts.query}" if parts.query else ""))

    return decide


def _every_request(store: ObjectStore) -> None:
    """Make a request of each kind: small ones, parts, a completion, a listing and a deletion."""
    store.put("name", b"data", Overwrite())
    upload = store.begin_upload("large")
    store.complete_upload(upload, [store.upload_part(upload, 1, 0, [memoryview(b"d" * (256 << 10))])])
    store.read_into("large", 0, [memoryview(bytearray(100))])
    assert {info.name for info in store.list().objects} == {"name", "large"}
    store.delete(["name", "large"])


@pytest.fixture(params=_KINDS)
def server(request: pytest.FixtureRequest) -> S3Server | GCSServer:
    found: S3Server | GCSServer = request.getfixturevalue("moto" if request.param == "s3" else "gcs")
    return found


def _kind(server: S3Server | GCSServer) -> str:
    return "s3" if isinstance(server, S3Server) else "gs"


def test_every_request_goes_through_a_proxy_with_its_password(
    monkeypatch: pytest.MonkeyPatch, server: S3Server | GCSServer
) -> None:
    """No name of the store resolves here: a request past the proxy would fail."""
    seen: list[str] = []
    bucket = server.new_bucket()
    with proxied(server.endpoint) as proxy:
        proxy.rule(_forwarding(seen))
        monkeypatch.setenv("http_proxy", proxy.endpoint.replace("//", f"//{_USER}@"))
        # The GCS server names itself in the URL of an upload.
        endpoint = f"http://{_HOST}" if _kind(server) == "s3" else server.endpoint
        with _open(_kind(server), endpoint, bucket) as store:
            _every_request(store)
        assert len(seen) == proxy.count


def test_a_host_in_no_proxy_is_never_sent_to_the_proxy(
    monkeypatch: pytest.MonkeyPatch, server: S3Server | GCSServer
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{unused_port()}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with _open(_kind(server), server.endpoint, server.new_bucket()) as store:
        _every_request(store)


def test_a_proxy_that_changes_is_followed(
    monkeypatch: pytest.MonkeyPatch, server: S3Server | GCSServer
) -> None:
    """Connections are kept from one store to the next, and not those of another proxy."""
    bucket = server.new_bucket()
    with proxied(server.endpoint) as proxy:
        proxy.rule(_forwarding([]))
        monkeypatch.setenv("http_proxy", proxy.endpoint.replace("//", f"//{_USER}@"))
        with _open(_kind(server), server.endpoint, bucket) as store:
            store.put("name", b"data", Overwrite())
        count = proxy.count
        monkeypatch.delenv("http_proxy")
        with _open(_kind(server), server.endpoint, bucket) as store:
            store.put("name", b"data", Overwrite())
        assert proxy.count == count


def test_a_proxy_of_storage_options_is_named_by_them() -> None:
    port = unused_port()
    keys = {"key": "test", "secret": "testtest"}
    config = {"config_kwargs": {"proxies": {"http": f"http://{_USER}@127.0.0.1:{port}"}}}
    for call in _CALLS:
        error = _error("s3", f"http://{_HOST}:9000", call, storage_options={**keys, **config})
        source = "proxies in config_kwargs of storage_options"
        assert f"the proxy http://127.0.0.1:{port} ({source}) refused the connection" in error.message
        assert f"remove it from {source}" in (error.hint or "")


def test_a_completion_goes_the_way_of_all_other_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore decides by the endpoint, not by the host of the bucket, which ``NO_PROXY`` names here."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{unused_port()}")
    monkeypatch.setenv("no_proxy", f"bucket.{_HOST}")
    virtual = {"config_kwargs": {"s3": {"addressing_style": "virtual"}}}
    keys = {"key": "test", "secret": "testtest"}
    calls: list[Callable[[ObjectStore], object]] = [
        lambda store: store.stat("name"),
        lambda store: store.complete_upload(Upload("name", "id"), []),
    ]
    with _open("s3", f"http://{_HOST}:9000", storage_options={**keys, **virtual}) as store:
        for act in calls:
            with pytest.raises(StorageError, match=r"\(http_proxy\) refused the connection"):
                act(store)
