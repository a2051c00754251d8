"""The URL of a server: what is wrong with one, and how to write it."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

_HOST: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?\.?")
_WITH_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LONGEST_HOST: Final = 255
_EXAMPLE: Final = "http://127.0.0.1:9000 or https://s3.example.com"


@dataclass(frozen=True, slots=True)
class Fault:
    """A reason why a URL is no endpoint, and what to write instead."""

    what: str
    cure: str
    secret: bool = False
    """True if the URL may hold a password or a signature, so that no message should repeat it."""


def host_and_port(host: str, port: int) -> str:
    """Return host and port as one text, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def may_hold_secret(url: str) -> bool:
    """Return True if a URL has a user and password, or a query, which may be signed."""
    return any(character in url for character in "@?#")


def fault_of(url: str) -> Fault | None:
    """Return the first fault of an endpoint's URL, None if it has none."""
    if may_hold_secret(url):
        return Fault(
            "has credentials or a query in it",
            f"Write a URL without credentials or a query, such as {_EXAMPLE}",
            secret=True,
        )
    if any(character.isspace() or not character.isprintable() for character in url):
        return Fault("has white space in it", f"Write it like {_EXAMPLE}")
    if _WITH_SCHEME.match(url) is None:
        bare = url.lstrip("/")
        return Fault(
            "has no scheme", f"Write http://{bare} or, if the server has a certificate, https://{bare}"
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return Fault(
            "has a malformed host or port",
            "Write an IPv6 address in brackets, as in http://[::1]:9000, and a port as a number up to 65535",
        )
    if parts.scheme not in ("http", "https"):
        return Fault(f"has the scheme {parts.scheme}", "The scheme of an endpoint_url is http:// or https://")
    if not host or port == 0:
        return Fault(f"has no {'port' if host else 'host'}", f"Write it like {_EXAMPLE}")
    if not _is_host(host):
        return Fault(f"has {host!r} as its host", f"Write a host's name or address, as in {_EXAMPLE}")
    return None


def is_address(url: str) -> bool:
    """Return True if the host of a URL without faults is an IP address."""
    try:
        ipaddress.ip_address(urlsplit(url).hostname or "")
    except ValueError:
        return False
    return True


def _is_host(host: str) -> bool:
    if ":" not in host:
        return len(host) <= _LONGEST_HOST and ".." not in host and _HOST.fullmatch(host) is not None
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
