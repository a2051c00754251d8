"""An examination of a server: its name, a connection, TLS, and the clock by its ``Date``."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Generator
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Final
from urllib.parse import urlsplit

from cloudckpt.backends.config.endpoint_url import host_and_port
from cloudckpt.backends.finding import Finding
from cloudckpt.backends.stores.failure_causes import Route, TunnelError, cause_of, words
from cloudckpt.backends.stores.http.proxies import PORTS, Proxy, unused_all_proxy
from cloudckpt.backends.stores.http.tls import context as tls_context

_SECONDS: Final = 5.0
_LATE: Final = 60.0
_REFUSED: Final = 900.0
"""Seconds by which S3 lets the time of a signed request be off; Google's tokens go by the time as well."""
_SET_IT: Final = "Have the host's clock set by NTP or chrony (a container has its host's)"


def reached(route: Route) -> Generator[Finding, None, bool]:
    """Look up the server's host, connect, and speak TLS where the endpoint is one of https.

    Where requests go through a proxy, it is looked up and connected to, and asked for a tunnel if need be.

    Returns:
        True if all of it could be done.
    """
    parts, proxy = urlsplit(route.endpoint), route.proxy
    yield _proxy(route)
    target = (route.host, parts.port or PORTS.get(parts.scheme, 443))
    host, port = target if proxy is None else proxy.address
    through = "" if proxy is None else f", the proxy before {route.host}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        yield _failure("name", error, route)
        return False
    addresses = sorted({str(one[4][0]) for one in found})
    more = f" and {len(addresses) - 1} more" if len(addresses) > 1 else ""
    yield Finding(
        "name", "ok", f"{host}{through}" if host in addresses else f"{host} is {addresses[0]}{more}{through}"
    )
    try:
        with socket.create_connection((host, port), timeout=_SECONDS) as connection:
            yield from _spoken(connection, route, target, f"{host}:{port}")
    except (OSError, http.client.HTTPException) as error:
        yield _failure("connection", error, route)
        return False
    return True


def clock(date: str | None, asked: float, answered: float, *, refused: bool = False) -> Finding:
    """Return the finding on this machine's clock, by the ``Date`` of an answer.

    Args:
        date: the header.
        asked: this machine's time when the request went out, in seconds.
        answered: when the answer had come.
        refused: whether the server said that the time of the request is too far off.
    """
    off = seconds_off(date, asked, answered)
    if off is None or (refused and not off):
        if refused:
            return Finding("clock", "failed", "the server refuses the time of this machine", _SET_IT)
        return Finding("clock", "unknown", "the server does not tell its time")
    way = "behind" if off < 0 else "ahead of"
    if refused or abs(off) > _REFUSED:
        what = f"this machine's clock is {duration(off)} {way} the server's ({abs(off):,.0f} s)"
        return Finding("clock", "failed", f"{what}{', which refuses it' if refused else ''}", _SET_IT)
    if abs(off) > _LATE:
        what = f"this machine's clock is {duration(off)} {way} the server's; from 15 minutes on it is refused"
        return Finding("clock", "warning", what, _SET_IT)
    return Finding("clock", "ok", "this machine's agrees with the server's")


def seconds_off(date: str | None, asked: float, answered: float) -> float | None:
    """Return the seconds that this machine's clock is ahead of the server's, negative if it is behind.

    Args:
        date: the ``Date`` header of an answer, in whole seconds: the time is up to a second later.
        asked: this machine's time when the request went out, in seconds.
        answered: this machine's time when the answer had come.

    Returns:
        0 for clocks that agree; None without a date that can be read.
    """
    try:
        server_time = None if date is None else parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None
    if server_time is None:
        return None
    behind, ahead = server_time - answered, asked - (server_time + 1)
    return -behind if behind > max(ahead, 0.0) else max(ahead, 0.0)


def duration(seconds: float) -> str:
    """Return a length of time in minutes, or in seconds below one minute."""
    minutes = round(abs(seconds) / 60)
    return f"{minutes} min" if minutes else f"{abs(seconds):.0f} s"


def _proxy(route: Route) -> Finding:
    if route.proxy is not None:
        return Finding("proxy", "ok", f"requests to {route.host} go through {route.proxy}")
    if (name := unused_all_proxy()) is not None:
        what = f"none is used for {route.host}: {name} is set, which S3 and GCS clients do not use"
        return Finding("proxy", "warning", what, "Set HTTPS_PROXY or HTTP_PROXY if requests need the proxy")
    return Finding("proxy", "ok", f"none is used for {route.host}")


def _spoken(
    connection: socket.socket, route: Route, target: tuple[str, int], at: str
) -> Generator[Finding, None, None]:
    """Ask a proxy for a tunnel, and speak TLS, as far as requests do."""
    proxy, is_tls = route.proxy, route.endpoint.startswith("https:")
    if proxy is not None and proxy.url.startswith("https:"):
        with tls_context(route.verify).wrap_socket(connection, server_hostname=proxy.address[0]) as wrapped:
            yield Finding("connection", "ok", f"{at} takes connections, by {wrapped.version()}")
        return
    if proxy is not None and is_tls:
        _open_tunnel(connection, proxy, target)
    if is_tls:
        with tls_context(route.verify).wrap_socket(connection, server_hostname=target[0]) as wrapped:
            yield Finding("connection", "ok", f"{at} takes connections, by {wrapped.version()}")
        return
    yield Finding("connection", "ok", f"{at} takes connections")


def _open_tunnel(connection: socket.socket, proxy: Proxy, target: tuple[str, int]) -> None:
    """Have a proxy connect to the target.

    Raises:
        TunnelError: the proxy refused.
        HTTPException: it does not speak HTTP.
    """
    host = host_and_port(*target)
    authorization = f"Proxy-Authorization: {proxy.authorization}\r\n" if proxy.authorization else ""
    connection.sendall(f"CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n{authorization}\r\n".encode())
    answer = http.client.HTTPResponse(connection, method="CONNECT")
    answer.begin()
    if answer.status != HTTPStatus.OK:
        raise TunnelError(answer.status, answer.reason)


def _failure(check: str, error: Exception, route: Route) -> Finding:
    cause = cause_of(error, route, connecting=True)
    if cause is None:
        return Finding(check, "failed", words(error), f"Check {route.settings}")
    return Finding(check, "failed", cause.what, cause.cure)
