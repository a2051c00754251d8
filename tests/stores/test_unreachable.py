"""An endpoint that can't be reached or trusted: the error names host, port and the cure, on both stores."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointError, ConfigurationError, StorageError, UnansweredError
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import ObjectStore, Overwrite
from support.answers import WELCOME, answering
from support.certificate import self_signed
from support.proxy import proxied
from support.servers import unused_port

_CALLS: dict[str, Callable[[ObjectStore], object]] = {
    "list": lambda store: store.list(),
    "put": lambda store: store.put("name", b"data", Overwrite()),
    "get": lambda store: store.stat("name"),
}
_SETTINGS = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}
_NOWHERE = "255.255.255.255"
"""An address that the kernel makes no connection to."""
every_call = pytest.mark.parametrize("call", _CALLS)
every_store = pytest.mark.parametrize("kind", _SETTINGS)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def _error(kind: str, endpoint: str, call: str, **more: Any) -> CheckpointError:
    options: dict[str, Any] = {"anon": True}
    if kind == "s3":
        options = {"region": "us-east-1", "storage_options": {"key": "test", "secret": "testtest"}}
    target = Target.parse(f"{kind}://bucket/run", endpoint_url=endpoint, **{**options, **more})
    with open_store(target) as store, pytest.raises(CheckpointError) as caught:
        _CALLS[call](store)
    assert caught.value.uri == target.uri and endpoint in caught.value.message
    return caught.value


@every_store
@every_call
def test_a_name_that_does_not_resolve(kind: str, call: str) -> None:
    error = _error(kind, "http://store.invalid:9000", call)
    assert type(error) is StorageError
    assert "store.invalid:9000 has a name that does not resolve" in error.message
    for word in ("spelling", "DNS", "endpoint_url", _SETTINGS[kind], "set HTTPS_PROXY"):
        assert word in (error.hint or "")


@every_store
@every_call
def test_a_port_that_refuses(kind: str, call: str) -> None:
    port = unused_port()
    error = _error(kind, f"http://127.0.0.1:{port}", call)
    assert type(error) is StorageError
    assert error.message.endswith(f": 127.0.0.1:{port} refused the connection")
    for word in ("host and port", "endpoint_url", _SETTINGS[kind], "firewalls"):
        assert word in (error.hint or "")


@every_store
@every_call
def test_a_port_whose_connections_are_dropped(kind: str, call: str) -> None:
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):  # with a full queue the kernel drops attempts to connect
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        port = listener.getsockname()[1]
        error = _error(kind, f"http://127.0.0.1:{port}", call, timeout=0.3)
    assert type(error) is StorageError
    assert f"127.0.0.1:{port} did not answer an attempt to connect in time" in error.message
    assert "firewalls" in (error.hint or "")


@every_store
@every_call
def test_a_network_without_a_route(kind: str, call: str) -> None:
    error = _error(kind, f"http://{_NOWHERE}:9000", call)
    assert type(error) is StorageError
    assert f"{_NOWHERE}:9000 can't be reached from here (ENETUNREACH)" in error.message
    assert "routes" in (error.hint or "")


@contextlib.contextmanager
def _speaking_tls(folder: Path, **certificate: Any) -> Iterator[str]:
    """Run a server of https before nothing; yields its URL."""
    context, _ = self_signed(folder, **certificate)
    with proxied("http://127.0.0.1:1", context) as proxy:
        yield proxy.endpoint


@every_store
@every_call
@pytest.mark.parametrize(
    ("certificate", "said", "cure"),
    [
        ({}, "is not trusted (self", {"s3": "AWS_CA_BUNDLE", "gs": "SSL_CERT_FILE"}),
        ({"days": (1, 2)}, "is not valid yet by this machine's clock, which says", "NTP"),
        ({"days": (-2, -1)}, "has expired by this machine's clock, which says", "NTP"),
        ({"address": "127.0.0.9"}, "is for another host", "Use the name"),
    ],
    ids=["unknown authority", "not yet valid", "expired", "another host"],
)
def test_a_certificate_that_is_refused(  # noqa: PLR0917 - parameters
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
    call: str,
    certificate: dict[str, Any],
    said: str,
    cure: str | dict[str, str],
) -> None:
    with _speaking_tls(tmp_path, **certificate) as endpoint:
        if certificate:  # trusted, but for what is wrong with it
            for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE"):
                monkeypatch.setenv(name, str(tmp_path / "certificate.pem"))
        error = _error(kind, endpoint, call)
    assert type(error) is StorageError
    at = endpoint.removeprefix("https://")
    assert f"the certificate of {at} {said}" in error.message
    assert (cure if isinstance(cure, str) else cure[kind]) in (error.hint or "")


def test_a_machine_without_authorities_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only GCS: botocore brings authorities of its own."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    with _speaking_tls(tmp_path) as endpoint:
        error = _error("gs", endpoint, "list")
    assert f"this machine has no CA certificates in {tmp_path / 'none.pem'} or" in error.message
    assert "ca-certificates" in (error.hint or "")


@every_call
def test_a_file_of_authorities_that_does_not_exist(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    target = Target.parse("s3://bucket/run", endpoint_url="https://127.0.0.1:9", region="us-east-1")
    with open_store(target) as store, pytest.raises(ConfigurationError) as caught:
        _CALLS[call](store)
    assert str(tmp_path / "none.pem") in str(caught.value) and "AWS_CA_BUNDLE" in str(caught.value)


@every_store
@every_call
def test_https_to_a_port_of_plain_http(kind: str, call: str) -> None:
    with answering(200, WELCOME, "text/html") as plain:
        error = _error(kind, plain.replace("http:", "https:"), call)
    assert isinstance(error, UnansweredError) and "does not speak TLS" in error.message
    assert "write http:// in the option endpoint_url" in (error.hint or "")


@every_store
@every_call
def test_plain_http_to_a_port_of_tls_that_just_hangs_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, call: str
) -> None:
    with _speaking_tls(tmp_path) as endpoint:
        error = _error(kind, endpoint.replace("https:", "http:"), call, retries=0)
    capsys.readouterr()  # what the server complains of
    assert isinstance(error, UnansweredError)
    assert "http:// or https:// in the option endpoint_url" in (error.hint or "")
