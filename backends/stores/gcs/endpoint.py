"""The URL of the server that a GCS store talks to, and whether that server is Google's own."""

from __future__ import annotations

import os
from typing import Final
from urllib.parse import urlsplit

from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from cloudckpt.backends.config.options import Options
from cloudckpt.backends.errors import ConfigurationError, StorageError
from cloudckpt.backends.stores.failure_causes import origin

_VARIABLE: Final = "STORAGE_EMULATOR_HOST"
_UNSET: Final = ("", "default")
"""Values of the variable that gcsfs takes for none."""
_PORTS: Final = {"http": 80, "https": 443}
_DOMAIN: Final = "googleapis.com"
"""Of storage.googleapis.com and its private, regional and mutual TLS variants."""


def configured_endpoint(options: Options) -> str | None:
    """Return the URL of the server that the options or the environment name, None for Google's own.

    Google's client libraries take ``STORAGE_EMULATOR_HOST`` without a scheme, as ``localhost:9000``. Such an
    endpoint is one of http.

    Raises:
        ConfigurationError: it is not a URL of http or https.
    """
    given, source = options.endpoint_url, "the option endpoint_url"
    if given is None and (stored := options.storage_options.get("endpoint_url")) is not None:
        given, source = str(stored), "endpoint_url in storage_options"
    if given is None:
        given, source = os.environ.get(_VARIABLE, ""), _VARIABLE
        if given in _UNSET:
            return None
    url = (given if "://" in given else f"http://{given}").rstrip("/")
    if not _is_endpoint(url):
        raise ConfigurationError(
            f"{source} is not the URL of a server",
            hint="Give a scheme, a host and a port, such as http://localhost:9000",
        )
    return url


def is_google(endpoint: str) -> bool:
    """Return True for an endpoint of Google's own, which supports all that its documentation says."""
    try:
        host = (urlsplit(endpoint).hostname or "").rstrip(".")
    except ValueError:
        return False
    return host == _DOMAIN or host.endswith(f".{_DOMAIN}")


def serves_xml(endpoint: str) -> bool:
    """Return True for an endpoint of Google's own that is known to serve the XML API.

    These are storage.googleapis.com, its mutual TLS and regional variants, and the names of Private Service
    Connect. Others, such as www.googleapis.com, serve the JSON API alone, or are not documented.
    """
    first = (urlsplit(endpoint).hostname or "").partition(".")[0]
    return is_google(endpoint) and (first == "storage" or first.startswith("storage-"))


def same_origin(url: str, endpoint: str) -> bool:
    """Return True if a URL has the scheme, host and port of the endpoint."""
    return _origin(url) is not None and _origin(url) == _origin(endpoint)


def is_of(url: str, endpoint: str) -> bool:
    """Return True for a URL to which a request may go: one of the endpoint, or of Google's for Google's own.

    The URL of an upload session comes from an answer, or from what another process left in the store.
    """
    if same_origin(url, endpoint):
        return True
    return urlsplit(url).scheme == "https" and is_google(url) and is_google(endpoint)


def elsewhere(url: str, endpoint: str) -> StorageError:
    """Return the error for a URL of an upload that is not one of the endpoint."""
    return StorageError(
        f"the URL of an upload leads to {origin(url)}, and not to the endpoint {endpoint}: nothing was sent",
        hint="Check the option endpoint_url or STORAGE_EMULATOR_HOST, the public address that an emulator is "
        "given, and gateways before the server",
    )


def _origin(url: str) -> tuple[str, str, int | None] | None:
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:  # of the host or the port
        return None
    if "@" in parts.netloc or "\\" in url:  # which clients read in different ways
        return None
    return parts.scheme, (parts.hostname or "").rstrip("."), port


def _is_endpoint(url: str) -> bool:
    try:
        parts = parse_url(url)
    except LocationParseError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.host) and not parts.query
