"""Connections: to all addresses of a name, past dead ones, over IPv6, and with resumed TLS sessions."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.http import server_addresses
from cloudckpt.backends.stores.http.server_addresses import Addresses
from support.certificate import self_signed
from support.gcs import GCSServer
from support.places import Place, new_place
from support.proxy import proxied
from support.servers import S3Server

NAME = "localhost"
FIRST, SECOND, DEAD = "127.0.0.1", "127.0.0.2", "127.0.0.3"

Names = Callable[..., None]


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Have a name resolve to some addresses of this machine."""
    resolve = socket.getaddrinfo
    monkeypatch.setattr(server_addresses, "_known", {})

    def resolve_to(*found: str) -> None:
        def getaddrinfo(host: Any, *rest: Any, **options: Any) -> list[Any]:
            hosts = found if host == NAME else (host,)
            return [info for one in hosts for info in resolve(one, *rest, **options)]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return resolve_to


class Listener:
    """Accepts connections and counts them by the address that they came to."""

    def __init__(self, *hosts: str) -> None:
        self.accepted: Counter[str] = Counter()
        self.port = 0
        self._sockets: list[socket.socket] = []
        for host in hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = socket.create_server((host, self.port), family=family, backlog=50)
            self.port = listening.getsockname()[1]
            self._sockets.append(listening)
            threading.Thread(target=self._accept, args=(listening, host), daemon=True).start()

    def _accept(self, listening: socket.socket, host: str) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                self.accepted[host] += 1
                connection.close()

    def close(self) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@contextlib.contextmanager
def listening(*hosts: str) -> Iterator[Listener]:
    listener = Listener(*hosts)
    try:
        yield listener
    finally:
        listener.close()


def connect(to: Addresses, count: int) -> list[str]:
    """Open connections and return the addresses that they went to."""
    peers = []
    for _ in range(count):
        with to.connect(5.0) as sock:
            peers.append(sock.getpeername()[0])
    return peers


def test_connections_are_spread_over_all_addresses_of_both_families(named: Names) -> None:
    named(FIRST, SECOND, "::1")
    with listening(FIRST, SECOND, "::1") as server:
        assert Counter(connect(Addresses(NAME, server.port), 9)) == {FIRST: 3, SECOND: 3, "::1": 3}


def test_an_address_that_refuses_is_passed_over_and_left_out_for_a_while(
    named: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(DEAD, FIRST, SECOND)
    tried: list[str] = []
    begin = server_addresses._started

    def noting(address: server_addresses.Address, *rest: Any) -> socket.socket:
        tried.append(address.sockaddr[0])
        return begin(address, *rest)

    monkeypatch.setattr(server_addresses, "_started", noting)
    with listening(FIRST, SECOND) as server:
        to = Addresses(NAME, server.port)
        assert set(connect(to, 10)) == {FIRST, SECOND}
        assert tried.count(DEAD) == 1
        monkeypatch.setattr(server_addresses, "_DEAD_FOR", 0.0)
        to._dead.clear()
        connect(to, 3)
        assert tried.count(DEAD) > 1


def test_an_address_that_does_not_answer_costs_a_moment_and_no_timeout(named: Names) -> None:
    named(DEAD, FIRST)
    with listening(FIRST) as server, contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind((DEAD, server.port))
        full.listen(0)
        for _ in range(3):  # the backlog is full: nothing answers any more
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((DEAD, server.port))
        to = Addresses(NAME, server.port)
        began = time.monotonic()
        assert set(connect(to, 6)) == {FIRST}
        assert time.monotonic() - began < 3.0


def test_where_no_address_answers_the_error_says_why(named: Names) -> None:
    named(FIRST, SECOND)
    with socket.create_server((FIRST, 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        Addresses(NAME, port).connect(5.0)
    with pytest.raises(socket.gaierror):
        Addresses("no-such-name.invalid", port).connect(5.0)


class _Relay:
    """Passes connections to some addresses on to a server, and counts them."""

    def __init__(self, upstream: str, *hosts: str) -> None:
        host, _, port = upstream.partition("://")[2].rpartition(":")
        self._upstream = host, int(port)
        self.accepted: Counter[str] = Counter()
        self.port = 0
        self._sockets = []
        for one in hosts:
            family = socket.AF_INET6 if ":" in one else socket.AF_INET
            listening = socket.create_server((one, self.port), family=family)
            self.port = listening.getsockname()[1]
            self._sockets.append(listening)
            threading.Thread(target=self._accept, args=(listening, one), daemon=True).start()

    def _accept(self, listening: socket.socket, host: str) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listening.accept()
                self.accepted[host] += 1
                server = socket.create_connection(self._upstream)
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=_pass_on, args=(source, sink), daemon=True).start()

    def close(self) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with source:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture(params=["moto", "gcs"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, s3_server_named: Callable[[str], S3Server]
) -> Place:
    return new_place(request.param, tmp_path, s3_server_named)


def save_and_load(place: Place) -> None:
    state = {f"t{at}": torch.full((1000,), float(at)) for at in range(4)}
    dcp.save(state, storage_writer=place.writer())
    loaded = {name: torch.zeros(1000) for name in state}
    dcp.load(loaded, storage_reader=place.reader())
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_save_and_a_load_use_all_addresses_of_the_endpoint_and_one_may_be_dead(
    place: Place, named: Names
) -> None:
    named(DEAD, FIRST, SECOND)
    assert isinstance(place.server, S3Server | GCSServer)
    relay = _Relay(place.server.endpoint, FIRST, SECOND)
    try:
        save_and_load(place.behind(f"http://{NAME}:{relay.port}"))
    finally:
        relay.close()
    assert relay.accepted.keys() == {FIRST, SECOND}


def test_an_endpoint_is_reached_at_a_literal_of_ipv6(place: Place) -> None:
    assert isinstance(place.server, S3Server | GCSServer)
    relay = _Relay(place.server.endpoint, "::1")
    try:
        save_and_load(place.behind(f"http://[::1]:{relay.port}"))
    finally:
        relay.close()
    assert relay.accepted["::1"] > 0


class _TLSServer(ThreadingHTTPServer):
    """Answers like S3 to a HEAD and closes; counts handshakes, and those that resumed a session."""

    daemon_threads = True
    handshakes = 0
    resumed = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        assert isinstance(self.server, _TLSServer)
        self.server.handshakes += 1
        self.server.resumed += bool(self.request.session_reused)

    def do_HEAD(self) -> None:
        self.send_response(200)
        for name, value in (("ETag", '"x"'), ("Content-Length", "4"), ("Connection", "close")):
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        document = b'{"name": "run/name", "size": "4", "generation": "1"}'
        self.send_response(200)
        for name, value in (("Content-Length", str(len(document))), ("Connection", "close")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(document)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        """Stay silent."""


@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def test_tls_sessions_are_resumed(
    scheme: str, version: ssl.TLSVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, trusted = self_signed(tmp_path)
    context.minimum_version = context.maximum_version = version
    for name in ("SSL_CERT_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(name, str(trusted))
    with _TLSServer((FIRST, 0), _Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            options: dict[str, Any] = {"endpoint_url": f"https://{FIRST}:{server.server_port}", "retries": 0}
            if scheme == "s3":
                options["storage_options"] = {"key": "k", "secret": "s"}
                options["region"] = "us-east-1"
            else:
                options["anon"] = True
            with open_store(Target.parse(f"{scheme}://bucket/run", **options)) as store:
                for _ in range(4):
                    assert store.stat("name").size == 4
        finally:
            server.shutdown()
            thread.join()
    assert (server.handshakes, server.resumed) == (4, 3)


def test_a_checkpoint_process_keeps_its_connections_from_one_save_to_the_next(place: Place) -> None:
    assert isinstance(place.server, S3Server | GCSServer)
    with proxied(place.server.endpoint) as proxy:
        relay = _Relay(proxy.endpoint, FIRST)
        try:
            behind = place.behind(f"http://{FIRST}:{relay.port}")
            with cloudckpt.Checkpointer(behind.uri, preemption_grace=None, **behind.options) as checkpointer:
                for step in range(3):
                    checkpointer.save(step, {"t": torch.ones(1000)})
                before = relay.accepted[FIRST]
                checkpointer.save(3, {"t": torch.ones(1000)})
                assert relay.accepted[FIRST] - before <= 1
        finally:
            relay.close()


def test_a_store_that_is_closed_leaves_the_connections_of_another_one_open(place: Place) -> None:
    assert isinstance(place.server, S3Server | GCSServer)
    with proxied(place.server.endpoint) as proxy:
        relay = _Relay(proxy.endpoint, FIRST)
        try:
            behind = place.behind(f"http://{FIRST}:{relay.port}")
            target = Target.parse(behind.uri, **behind.options)
            first, second = open_store(target), open_store(target)
            for one in (first, second, first, second):
                assert not one.holds("nothing")
                second.close()
            assert relay.accepted[FIRST] == 1
            first.close()
            assert not second.holds("nothing")
            assert relay.accepted[FIRST] == 2
            second.close()
        finally:
            relay.close()
