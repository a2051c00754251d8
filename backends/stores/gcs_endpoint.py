"""The URL of the server that a GCS store talks to, and whether that server is Google's own."""

from __future__ import annotations

import os
from typing import Final
from urllib.parse import urlsplit

from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.options import Options

_VARIABLE: Final = "STORAGE_EMULATOR_HOST"
_UNSET: Final = ("", "default")
"""Values of the variable that gcsfs takes for none."""
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
    host = (urlsplit(endpoint).hostname or "").rstrip(".")
    return host == _DOMAIN or host.endswith(f".{_DOMAIN}")


def serves_xml(endpoint: str) -> bool:
    """Return True for an endpoint of Google's own that is known to serve the XML API.

    These are storage.googleapis.com, its mutual TLS and regional variants, and the names of Private Service
    Connect. Others, such as www.googleapis.com, serve the JSON API alone, or are not documented.
    """
    first = (urlsplit(endpoint).hostname or "").partition(".")[0]
    return is_google(endpoint) and (first == "storage" or first.startswith("storage-"))


def _is_endpoint(url: str) -> bool:
    try:
        parts = parse_url(url)
    except LocationParseError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.host) and not parts.query
