"""Whether a server is there and on time: its name, a connection, TLS, and the clock by its ``Date``."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Generator
from email.utils import parsedate_to_datetime
from typing import Final
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from cloudckpt.backends.finding import Finding
from cloudckpt.backends.stores.tls import context as tls_context

_SECONDS: Final = 5.0
_PORTS: Final = {"http": 80, "https": 443}
_LATE: Final = 60.0
_REFUSED: Final = 900.0
"""Seconds by which S3 lets the time of a signed request be off; Google's tokens go by the time as well."""
_SET_IT: Final = "Have the host's clock set by NTP or chrony (a container has its host's)"


def reached(endpoint: str, verify: bool | str = True) -> Generator[Finding, None, bool]:
    """Look up the endpoint's host, connect, and speak TLS where it is https; whether all of it could be done.

    Where the environment names a proxy, that is what is connected to.

    Args:
        endpoint: a URL.
        verify: whether its certificate is checked; a path where one of one's own authorities is.
    """
    parts = urlsplit(endpoint)
    host, port = parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 443)
    proxy = getproxies().get(parts.scheme)
    through = ""
    if proxy and not proxy_bypass(parts.netloc):
        told = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        host, port, through = told.hostname or "", told.port or 80, f", the proxy before {parts.hostname}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        yield Finding(
            "name",
            "failed",
            f"no address is known of {host}{through}: {error.strerror or error}",
            "Check the spelling of endpoint_url and region, this machine's DNS and the proxy settings",
        )
        return False
    addresses = sorted({str(one[4][0]) for one in found})
    more = f" and {len(addresses) - 1} more" if len(addresses) > 1 else ""
    yield Finding(
        "name", "ok", f"{host}{through}" if host in addresses else f"{host} is {addresses[0]}{more}{through}"
    )
    finding = _connected(host, port, parts.scheme == "https" and not through, verify, through)
    yield finding
    return finding.state == "ok"


def clock(date: str | None, asked: float, answered: float, *, refused: bool = False) -> Finding:
    """What the ``Date`` of an answer says of this machine's clock.

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
        what = f"this machine's clock is {duration(off)} {way} the server's"
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
        told = None if date is None else parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None
    if told is None:
        return None
    behind, ahead = told - answered, asked - (told + 1)
    return -behind if behind > max(ahead, 0.0) else max(ahead, 0.0)


def duration(seconds: float) -> str:
    """Return a length of time in minutes, or in seconds below one minute."""
    minutes = round(abs(seconds) / 60)
    return f"{minutes} min" if minutes else f"{abs(seconds):.0f} s"


def _connected(host: str, port: int, tls: bool, verify: bool | str, through: str) -> Finding:
    at = f"{host}:{port}"
    try:
        with socket.create_connection((host, port), timeout=_SECONDS) as connection:
            if not tls:
                return Finding("connection", "ok", f"{at} takes connections{through}")
            with tls_context(verify).wrap_socket(connection, server_hostname=host) as wrapped:
                return Finding("connection", "ok", f"{at} takes connections, by {wrapped.version()}")
    except ssl.SSLCertVerificationError as error:
        what = f"the certificate of {at} is not to be trusted: {error.verify_message}"
        return Finding(
            "connection",
            "failed",
            what,
            "Install the authority's certificate, and name it in AWS_CA_BUNDLE or SSL_CERT_FILE",
        )
    except ssl.SSLError as error:
        what = f"{at} takes connections, and speaks no TLS: {error.reason or 'the handshake failed'}"
        return Finding(
            "connection", "failed", what, "Check the port and whether endpoint_url is one of http://"
        )
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or type(error).__name__
        return Finding(
            "connection",
            "failed",
            f"{at} takes no connection{through}: {why}",
            "Check endpoint_url, the firewall, the routes and the proxy settings (HTTPS_PROXY, NO_PROXY)",
        )
