"""``cloudckpt doctor`` tells what is wrong on the way to an endpoint, and names the proxy that is used."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from support.answers import WELCOME, answering, serving
from support.certificate import self_signed
from support.commands import run
from support.findings import assert_only, by_check, doctor
from support.gcs import GCSServer
from support.malformed import NOT_A_STORE, NOT_HTTP
from support.places import Place
from support.proxy import Proxy, RawAnswer, proxied
from support.servers import S3Server, unused_port


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(params=["s3", "gs"])
def place(request: pytest.FixtureRequest) -> Place:
    """A place on either kind of server."""
    if request.param == "s3":
        moto: S3Server = request.getfixturevalue("moto")
        return Place.on_server(moto, moto.new_bucket()).child("run")
    gcs: GCSServer = request.getfixturevalue("gcs")
    return Place.on_gcs(gcs, gcs.new_bucket()).child("run")


def _at(place: Place, endpoint: str) -> Place:
    place.options["endpoint_url"] = endpoint
    return place


def test_the_proxy_that_is_used_and_that_none_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = doctor(place)
    assert found["proxy"]["state"] == "ok" and found["proxy"]["what"] == "none is used for 127.0.0.1"
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1080")
    _, found = doctor(place)
    assert found["proxy"]["state"] == "warning" and "all_proxy is set" in found["proxy"]["what"]
    assert found["put"]["state"] == "ok"
    monkeypatch.setenv("HTTP_PROXY", "http://me:canary@proxy.invalid:3128")
    ran = run("doctor", place.uri, "--json", place=place)
    found = by_check(ran)
    assert ran.status == 1 and "canary" not in ran.out + ran.err
    assert found["proxy"]["what"].endswith("go through http://proxy.invalid:3128 (HTTP_PROXY)")
    assert_only(found, "name")
    assert (
        "the proxy http://proxy.invalid:3128 (HTTP_PROXY) has a name that does not" in found["name"]["what"]
    )
    assert "unset HTTP_PROXY" in found["name"]["advice"]


def test_a_proxy_of_socks_is_a_misuse(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "socks5://me:canary@127.0.0.1:1080")
    ran = run("doctor", place.uri, "--json", place=place)
    assert ran.status == 2 and "socks5://127.0.0.1:1080 of http_proxy is not supported" in ran.err
    assert "canary" not in ran.out + ran.err


@pytest.mark.parametrize("status", [403, 407, 502])
def test_a_proxy_that_opens_no_tunnel(place: Place, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            self.send_error(status)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in the base class
            """Stay silent."""

    with serving(Refusing) as url:
        monkeypatch.setenv("HTTPS_PROXY", url.replace("//", "//me:canary@"))
        ran = run("doctor", place.uri, "--json", place=_at(place, "https://store.invalid"))
    found = by_check(ran)
    assert ran.status == 1 and "canary" not in ran.out + ran.err
    assert_only(found, "connection")
    assert f"the proxy {url} (HTTPS_PROXY) refused to connect ({status} " in found["connection"]["what"]
    assert "add store.invalid to NO_PROXY" in found["connection"]["advice"]


class _Tunnels(BaseHTTPRequestHandler):
    """A proxy that connects to whatever it is asked for."""

    def do_CONNECT(self) -> None:
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as there:
            self.send_response(200)
            self.end_headers()
            self._pass_on(there)

    def _pass_on(self, there: socket.socket) -> None:
        """Pass bytes on in both directions until either side ends."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ, there)
            selector.register(there, selectors.EVENT_READ, self.connection)
            while True:
                for key, _ in selector.select():
                    assert isinstance(key.fileobj, socket.socket)
                    if not (data := key.fileobj.recv(1 << 16)):
                        self.close_connection = True
                        return
                    key.data.sendall(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in the base class
        """Stay silent."""


def test_tls_through_the_tunnel_of_a_proxy(
    moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, trusted = self_signed(tmp_path)
    place = Place.on_server(moto, moto.new_bucket()).child("run")
    with proxied(moto.endpoint, context) as server, serving(_Tunnels) as url:
        monkeypatch.setenv("https_proxy", url)
        _, found = doctor(place.behind(server.endpoint))
        assert_only(found, "connection")
        assert "is not trusted" in found["connection"]["what"]
        assert f"The proxy {url} (https_proxy) may replace certificates" in found["connection"]["advice"]
        monkeypatch.setenv("AWS_CA_BUNDLE", str(trusted))
        status, found = doctor(place.behind(server.endpoint))
    assert status == 0 and "TLS" in found["connection"]["what"] and found["put"]["state"] == "ok"


def test_a_port_that_refuses_and_a_name_that_does_not_resolve(place: Place) -> None:
    port = unused_port()
    status, found = doctor(_at(place, f"http://127.0.0.1:{port}"))
    assert status == 1
    assert_only(found, "connection")
    assert found["connection"]["what"] == f"127.0.0.1:{port} refused the connection"
    status, found = doctor(_at(place, "https://store.invalid"))
    assert status == 1
    assert_only(found, "name")
    assert "store.invalid:443 has a name that does not resolve" in found["name"]["what"]
    assert "DNS" in found["name"]["advice"]


def test_tls_that_is_not_spoken(place: Place) -> None:
    with answering(200, WELCOME, "text/html") as plain:
        _, found = doctor(_at(place, plain.replace("http:", "https:")))
    assert_only(found, "connection")
    assert "does not speak TLS" in found["connection"]["what"]
    assert "http://" in found["connection"]["advice"]


@pytest.mark.parametrize(("days", "said"), [((1, 2), "not valid yet"), ((-2, -1), "has expired")])
def test_a_certificate_of_another_time_points_at_the_clock(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: tuple[int, int], said: str
) -> None:
    context, trusted = self_signed(tmp_path, days=days)
    for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, str(trusted))
    with proxied("http://127.0.0.1:1", context) as server:
        _, found = doctor(_at(place, server.endpoint))
    assert_only(found, "connection")
    assert said in found["connection"]["what"] and "clock" in found["connection"]["what"]
    assert "NTP" in found["connection"]["advice"]


@contextlib.contextmanager
def _saying(data: bytes) -> Iterator[Proxy]:
    with proxied("http://127.0.0.1:1") as proxy:
        proxy.rule(lambda _: RawAnswer(data))
        yield proxy


@pytest.mark.parametrize("kind", ["a body alone", "the banner of SSH"])
def test_what_speaks_no_http(place: Place, kind: str) -> None:
    data, said = NOT_HTTP[kind]
    with _saying(data) as proxy:
        status, found = doctor(_at(place, proxy.endpoint))
    assert status == 1
    assert_only(found, "bucket")
    assert "malformed HTTP" in found["bucket"]["what"] and said in found["bucket"]["what"]
    assert urlsplit(proxy.endpoint).netloc in found["bucket"]["what"]


@pytest.mark.parametrize("kind", NOT_A_STORE)
def test_what_is_another_server(place: Place, kind: str) -> None:
    data, said = NOT_A_STORE[kind]
    with _saying(data) as proxy:
        status, found = doctor(_at(place, proxy.endpoint))
    assert status == 1
    assert_only(found, "bucket")
    assert "but not as" in found["bucket"]["what"] and said in found["bucket"]["what"]
    assert "login page" in found["bucket"]["advice"]
