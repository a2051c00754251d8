"""The HTTP proxy before a server: where it is set, and how to name it without its password.

botocore, aiobotocore and the connections of the GCS store take the proxy of a URL's scheme from the
environment, as :mod:`urllib.request` reads it. ``ALL_PROXY`` and SOCKS are not supported by botocore, so they
are supported nowhere.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from cloudckpt.backends.errors import ConfigurationError

PORTS: Final = {"http": 80, "https": 443}
"""Default ports, by scheme."""
_OF_OPTIONS: Final = "proxies in config_kwargs of storage_options"
_OF_SYSTEM: Final = "the proxy settings of the system"
_ALL: Final = "all_proxy"


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy of HTTP or HTTPS."""

    url: str = field(repr=False)
    """With its scheme, and with user and password where it has them."""
    source: str
    """The name of the environment variable that set it, or of what else did."""

    @property
    def is_of_environment(self) -> bool:
        """True if an environment variable set the proxy."""
        return self.source not in (_OF_OPTIONS, _OF_SYSTEM)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or PORTS.get(parts.scheme, 80)

    @property
    def authorization(self) -> str | None:
        """The value of ``Proxy-Authorization``, None where the URL has no user."""
        parts = urlsplit(self.url)
        if parts.username is None:
            return None
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        return f"Basic {base64.b64encode(pair.encode()).decode()}"

    def __str__(self) -> str:
        """Return the URL without user and password, and its source."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]} ({self.source})"

    def cure(self, host: str) -> str:
        """Return what to do where the proxy does not let requests to ``host`` through."""
        check = f"Check that the proxy runs, accepts its user and password, and allows {host}"
        if not self.is_of_environment:
            return f"{check}; or remove it from {self.source}"
        return f"{check}; or unset {self.source}, or add {host} to {_no_proxy()}, to connect without it"


def proxy_of(url: str, given: Mapping[str, str] | None = None) -> Proxy | None:
    """Return the proxy that requests to a URL go through, None where there is none.

    Args:
        url: of the server.
        given: proxies by scheme, in place of those of the environment.

    Raises:
        ConfigurationError: it is not the URL of an HTTP proxy.
    """
    parts = urlsplit(url)
    if given is not None:
        found, source = given.get(parts.scheme), _OF_OPTIONS
    elif proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    else:
        found = getproxies().get(parts.scheme)
        source = _variable(f"{parts.scheme}_proxy") or _OF_SYSTEM
    if not found:
        return None
    whole = found if "://" in found else f"http://{found.removeprefix('//')}"
    _check(whole, source)
    return Proxy(whole, source)


def unused_all_proxy() -> str | None:
    """Return the name of the variable ``ALL_PROXY`` as the environment has it, which no store uses."""
    return _variable(_ALL)


def _check(url: str, source: str) -> None:
    example = f"Set {source} to the URL of an HTTP proxy, such as http://proxy.example.com:3128, or remove it"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigurationError(
            f"the proxy of {source} has a malformed host or port", hint=example
        ) from None
    if parts.scheme not in PORTS:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        raise ConfigurationError(
            f"the proxy {shown} of {source} is not supported: its scheme is not http or https", hint=example
        )
    if not host:
        raise ConfigurationError(f"the proxy of {source} has no host", hint=example)


def _variable(lower: str) -> str | None:
    """Return the name by which a variable is set: in lower case, which goes first, or in any other."""
    if os.environ.get(lower):
        return lower
    return next((name for name, value in os.environ.items() if value and name.lower() == lower), None)


def _no_proxy() -> str:
    return _variable("no_proxy") or "NO_PROXY"
