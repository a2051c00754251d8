"""A distance between a client and a server on one machine: a network of three hosts, with TLS where asked
for.

Run as `python -m bench.distance [options] -- COMMAND...`, it starts the S3 server of `bench.endpoint` behind
the distance and runs the command on the client's host, with variables that name the endpoint, a bucket, the
keys and the authority. Far hosts are network namespaces: client, router and server. TCP between them is the
kernel's, so handshakes and requests cost round trips and a connection starts slowly. `bench.link_emulator`
has the router's packets wait. TLS is ended by haproxy. Without a round-trip time the server is near, on
loopback, and needs neither root nor a router.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bench.endpoint import Endpoint, served
from bench.link_emulator import PeerConnection
from support.certificate import self_signed
from support.gcs import GCSServer
from support.hosts import Host
from support.processes import HOST, Daemons, daemons, script, unused_port
from support.servers import S3Server

_TESTS = Path(__file__).resolve().parents[1]
_SEGMENT = 1448
"""Bytes of data in a TCP segment on Ethernet, with timestamps."""
_CLIENT, _CLIENT_ROUTER, _SERVER, _SERVER_ROUTER = "10.214.1.2", "10.214.1.1", "10.214.2.2", "10.214.2.1"


@dataclass(frozen=True, slots=True)
class Distance:
    """How far away a server is, and how it answers."""

    link: PeerConnection | None = None
    """None: near, on loopback."""
    tls: bool = False
    slow_start: bool = False
    """Connections start with TCP's initial window of ten segments, again after each pause. Else with the
    link's."""
    refuse_above: int | None = None
    """Requests a second above which the server answers 503 Slow Down."""

    @property
    def title(self) -> str:
        """The distance as a table names it: "30 ms, 90 MB/s, TLS"."""
        parts = ["near"]
        if self.link is not None:
            parts = [f"{self.link.rtt * 1e3:g} ms", *_rates(self.link)]
        if self.refuse_above is not None:
            parts.append(f"503 above {self.refuse_above}/s")
        return ", ".join([*parts, "TLS" if self.tls else "HTTP"])


def _rates(link: PeerConnection) -> Iterator[str]:
    if link.rate is not None:
        yield f"{link.rate / 1e6:g} MB/s"
    if link.slow_one_in:
        yield f"1 in {link.slow_one_in} at 1/{link.slow_factor:g} of it"
    if link.host_rate is not None:
        yield f"host {link.host_rate / 1e6:g} MB/s"


NAMED: Mapping[str, PeerConnection | None] = {
    "near": None,
    "metro": PeerConnection(rtt=0.005, rate=200e6),
    "far": PeerConnection(rtt=0.030, rate=90e6),
    "intercontinental": PeerConnection(rtt=0.100, rate=25e6),
}
"""The distances that benchmarks know by name."""


@dataclass(frozen=True, slots=True)
class Reached:
    """A server at a distance, as a client reaches it."""

    endpoint: str
    namespace: str | None
    """The network namespace that is the client's host; None: this machine."""
    authority: Path | None
    """The certificate that a client must trust."""

    @property
    def prefix(self) -> tuple[str, ...]:
        """The words that run a command line on the client's host."""
        return () if self.namespace is None else ("ip", "netns", "exec", self.namespace)

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which clients trust the server: botocore and awscrt, OpenSSL and Rust, requests."""
        if self.authority is None:
            return {}
        names = ["AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"]
        return dict.fromkeys(names, str(self.authority))


@contextmanager
def distant(server: Endpoint | GCSServer, distance: Distance) -> Iterator[Reached]:
    """Put a server that listens on loopback at a distance.

    Raises:
        NotInstalledError: haproxy is not installed.
        PermissionError: this process may not make network namespaces, or a program for them is not installed.
        ServerStartError: haproxy or the link did not start.
    """
    nearby = server.server.endpoint if isinstance(server, Endpoint) else server.endpoint
    if distance == Distance():
        yield Reached(nearby, None, None)
        return
    port = int(nearby.rpartition(":")[2])
    with ExitStack() as stack:
        family = stack.enter_context(daemons("distance"))
        authority: Path | None = None
        namespace: str | None = None
        address, listen, suffix = HOST, unused_port(), ""
        if distance.link is not None:
            client, host = stack.enter_context(
                _far_hosts(distance.link, family, slow_start=distance.slow_start)
            )
            namespace, address, listen = client.namespace, host.address, 443 if distance.tls else 80
            suffix = f" namespace {host.namespace}"
            if isinstance(server, Endpoint) and not distance.tls and distance.refuse_above is None:
                server.listen(host.namespace, host.address, listen)  # a proxy would only cost CPU
                yield Reached(f"http://{address}:{listen}", namespace, None)
                return
        if distance.tls:
            _, authority = self_signed(family.folder, address=address)
            both = family.folder / "both.pem"
            both.write_bytes(authority.read_bytes() + (family.folder / "key.pem").read_bytes())
            both.chmod(0o600)
            suffix += f" ssl crt {both}"
        haproxy = script("haproxy", "haproxy (Debian: apt-get install haproxy)", root=True)
        configuration = family.folder / "haproxy.cfg"
        requests = distance.refuse_above is not None or isinstance(server, GCSServer)
        bind = f"{address}:{listen}{suffix}"
        configuration.write_text(_configuration(bind, port, distance.refuse_above, requests=requests))
        family.start(haproxy, "-db", "-f", configuration)
        reached = Reached(f"{'https' if distance.tls else 'http'}://{address}:{listen}", namespace, authority)
        family.wait_until(lambda: _accepts(reached.prefix, address, listen))
        yield reached


def _configuration(bind: str, port: int, refuse_above: int | None, *, requests: bool) -> str:
    """Return haproxy's configuration, which hands on bytes as they come, or requests.

    With requests it can refuse some, and says of each by which scheme it came: GCS has URLs in its answers.
    """
    refusal = (
        ""
        if refuse_above is None
        else f"""
    stick-table type ip size 1k expire 10s store http_req_rate(1s)
    http-request track-sc0 src
    http-request return status 503 content-type application/xml string "{_SLOW_DOWN}" if {{ sc_http_req_rate(0) gt {refuse_above} }}
"""  # noqa: E501 - a line of haproxy's
    )
    forwarded = "\n    http-request set-header X-Forwarded-Proto https if { ssl_fc }" if requests else ""
    return f"""
global
    nbthread {min(os.cpu_count() or 1, 4)}
    tune.bufsize 65536
    tune.pipesize 1048576
    maxconn 4000
    ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256
defaults
    mode {"http" if requests else "tcp"}
    option splice-auto
    timeout connect 10s
    timeout client 600s
    timeout server 600s
frontend distance
    bind {bind}{refusal}{forwarded}
    default_backend endpoint
backend endpoint
    server endpoint {HOST}:{port}
"""


_SLOW_DOWN = "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


def _accepts(prefix: Sequence[str], address: str, port: int) -> bool:
    probe = f"import socket; socket.create_connection(({address!r}, {port}), 5)"
    done = subprocess.run(
        [*prefix, sys.executable, "-S", "-I", "-c", probe], capture_output=True, check=False
    )
    return not done.returncode


@contextmanager
def _far_hosts(link: PeerConnection, family: Daemons, *, slow_start: bool) -> Iterator[tuple[Host, Host]]:
    """Make a client's and a server's host with a router between them that emulates the link.

    The router's packets wait where they have left the sender's socket: else TCP would take them for not yet
    sent.
    """
    name = uuid.uuid4().hex[:6]
    ip, iptables = (_program(program) for program in ("ip", "iptables"))
    client = Host(f"ckpt-{name}-client", _CLIENT, "client")
    server = Host(f"ckpt-{name}-server", _SERVER, "server")
    router = f"ckpt-{name}-router"
    with ExitStack() as stack:
        for namespace in (client.namespace, server.namespace, router):
            _call(ip, "netns", "add", namespace)
            stack.callback(_call, ip, "netns", "delete", namespace)
            _call(ip, "-n", namespace, "link", "set", "lo", "up")
        for queue, (host, gateway) in enumerate([(client, _CLIENT_ROUTER), (server, _SERVER_ROUTER)]):
            port = f"to-{host.interface}"
            _call(
                *(
                    ip,
                    "link",
                    "add",
                    host.interface,
                    "netns",
                    host.namespace,
                    "numtxqueues",
                    "1",
                    "type",
                    "veth",
                ),
                *("peer", port, "netns", router),
            )
            _call(ip, "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _call(ip, "-n", host.namespace, "link", "set", host.interface, "up")
            _call(ip, "-n", router, "addr", "add", f"{gateway}/24", "dev", port)
            _call(ip, "-n", router, "link", "set", port, "up")
            _call(
                *(ip, "netns", "exec", router, iptables, "-t", "mangle", "-A", "FORWARD", "-i", port),
                *("-j", "NFQUEUE", "--queue-num", str(queue)),
            )
            metrics = _metrics(link, slow_start=slow_start)
            _call(ip, "-n", host.namespace, "route", "add", "default", "via", gateway, *metrics)
            _set(ip, host.namespace, _settings(link, slow_start=slow_start))
            if link.host_rate is not None:
                # At the sender, where TCP keeps few packets of each connection: none is lost, and all get
                # their share.
                limit = f"root tbf rate {round(8 * link.host_rate)}bit burst 512kb limit 256mb".split()
                inside = (ip, "netns", "exec", host.namespace)
                _call(*inside, _program("tc"), "qdisc", "add", "dev", host.interface, *limit)
        _set(ip, router, {"ip_forward": "1"})
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in _as_options(link).items()]
        family.start(
            *(ip, "netns", "exec", router, sys.executable, "-m", "bench.link_emulator", *arguments),
            PYTHONPATH=str(_TESTS),
        )
        family.wait_until(lambda: family.tail().startswith("ready"))
        yield client, server


def _as_options(link: PeerConnection) -> dict[str, float]:
    values = {name: getattr(link, name) for name in link.__slots__}
    return {name: value for name, value in values.items() if value is not None and name != "host_rate"}


def _window(link: PeerConnection) -> int | None:
    """Return the bytes in flight that fill a connection's share of the link, with a quarter to spare."""
    if link.rate is None:
        return None
    return round(1.25 * link.rate * (link.rtt + 2 * link.jitter + 0.004))


def _metrics(link: PeerConnection, *, slow_start: bool) -> list[str]:
    """Return the metrics of a route over the link.

    A connection may not send more than fills the link: else it would fill the router's memory, which loses
    nothing.
    """
    patience = ["rto_min", "3s"]  # the link loses nothing: a timeout would send again what only waits
    window = _window(link)
    if window is None:
        return patience
    segments = str(max(10, window // _SEGMENT))
    first = [] if slow_start else ["initcwnd", segments, "initrwnd", segments]
    return [*patience, "cwnd", "lock", segments, *first]


def _settings(link: PeerConnection, *, slow_start: bool) -> dict[str, str]:
    """Return the settings of a host's TCP whose buffers take the link's bandwidth-delay product."""
    most = max(32 << 20, 4 * (_window(link) or 0))
    first = 131072 if slow_start else max(131072, 3 * (_window(link) or 0))
    return {
        "tcp_rmem": f"4096 {first} {most}",
        "tcp_wmem": f"4096 16384 {most}",
        "tcp_min_tso_segs": "44",  # large packets on slow connections too: each costs the router the same
        "tcp_early_retrans": "0",
        "tcp_recovery": "0",
        "tcp_no_metrics_save": "1",
        "tcp_slow_start_after_idle": str(int(slow_start)),
    }


def _set(ip: str, namespace: str, settings: dict[str, str]) -> None:
    for name, value in settings.items():
        _call(ip, "netns", "exec", namespace, "sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{name}")


def _program(name: str) -> str:
    try:
        return script(name, f"{name} (Debian: iproute2, iptables)", root=True)
    except RuntimeError as error:
        raise PermissionError(f"cannot make the hosts of the benchmark: {error}") from error


def _call(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise PermissionError(
            f"cannot make the hosts of the benchmark: {error.stderr.strip() or error}"
        ) from error


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a distance to a parser; `from_options` reads them."""
    parser.add_argument(
        "--rtt-ms", type=float, help="round-trip time; without it the server is near, on loopback"
    )
    parser.add_argument("--rate-mb", type=float, help="MB/s of each connection, in each direction")
    parser.add_argument(
        "--host-rate-mb", type=float, help="MB/s of all connections together, in each direction"
    )
    parser.add_argument("--jitter-ms", type=float, default=0.0, help="on each way, up to so much")
    parser.add_argument(
        "--slow-one-in", type=int, default=0, help="one connection in so many is slow: the third first"
    )
    parser.add_argument("--slow-factor", type=float, default=10.0, help="times slower (default: 10)")
    parser.add_argument(
        "--slow-start", action="store_true", help="connections start with TCP's initial window"
    )
    parser.add_argument(
        "--refuse-above", type=int, help="requests a second above which the server answers 503"
    )
    parser.add_argument("--tls", action="store_true")


def from_options(options: argparse.Namespace) -> Distance:
    """Return the distance that the options of `add_options` describe."""
    link = None
    if options.rtt_ms is not None:
        link = PeerConnection(
            rtt=options.rtt_ms / 1e3,
            rate=options.rate_mb and options.rate_mb * 1e6,
            host_rate=options.host_rate_mb and options.host_rate_mb * 1e6,
            jitter=options.jitter_ms / 1e3,
            slow_one_in=options.slow_one_in,
            slow_factor=options.slow_factor,
        )
    return Distance(link, tls=options.tls, slow_start=options.slow_start, refuse_above=options.refuse_above)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command at a distance from an S3 server and return its exit code."""
    parser = argparse.ArgumentParser(prog="bench.distance", description=__doc__)
    add_options(parser)
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    options = parser.parse_args(arguments)
    with served() as near:
        bucket = near.server.new_bucket()
        with distant(near, from_options(options)) as reached:
            server: S3Server = replace(near.server, endpoint=reached.endpoint)
            variables = {
                **server.environment, **reached.environment,
                "ENDPOINT": reached.endpoint, "BUCKET": bucket, "AWS_DEFAULT_REGION": "us-east-1",
            }  # fmt: skip
            start = time.monotonic()
            code = subprocess.call([*reached.prefix, *options.command], env={**os.environ, **variables})
            print(f"{time.monotonic() - start:.1f} s, server: {near.counts()}", file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main())
