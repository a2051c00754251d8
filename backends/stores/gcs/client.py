"""The clients of a GCS store: gcsfs's configuration and credentials, and urllib3 for the bytes.

gcsfs takes the options first, so that ``storage_options`` mean here what they mean there, and
it finds credentials and renews them. Its own session carries nothing: it copies what it sends and receives.
Its plain class is used, for the extended one asks every bucket's type over gRPC before anything else.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote, urlencode

import google.auth.exceptions
import requests
import urllib3
from gcsfs.core import GCSFileSystem
from google.auth.transport.requests import Request
from urllib3.util.ssl_ import create_urllib3_context

from cloudckpt.backends.config.options import Options, where_credentials_belong
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.stores.failure_causes import Route
from cloudckpt.backends.stores.gcs.endpoint import (
    configured_endpoint,
    elsewhere,
    is_google,
    is_of,
    same_origin,
    serves_xml,
)
from cloudckpt.backends.stores.gcs.errors import SETTINGS, PageError, RefusedError
from cloudckpt.backends.stores.http import bounded
from cloudckpt.backends.stores.http.connections import POOLS
from cloudckpt.backends.stores.http.proxies import Proxy, proxy_of
from cloudckpt.backends.stores.http.request_body import BuffersBody
from cloudckpt.backends.stores.http.users import release, use
from cloudckpt.backends.stores.throttle import ON_BEHALF, Throttles
from cloudckpt.backends.transfer.request_limit import connections
from cloudckpt.backends.version import __version__

_CONNECT_SECONDS: Final = 5.0
_ASKED: Final = 1 << 17
"""Bytes that http.client asks a body for; ``BuffersBody`` hands out more at a time."""
_OF_OTHERS: Final = (*range(300, 308), HTTPStatus.PROXY_AUTHENTICATION_REQUIRED)
"""Statuses that GCS does not answer with."""
_REDIRECTION: Final = int(HTTPStatus.PERMANENT_REDIRECT)
"""Status that GCS answers with to a session alone, where it is no redirection."""
_ERROR_BYTES: Final = 1 << 16
_PAYER: Final = "x-goog-user-project"
_OF_FSSPEC: Final = frozenset(
    {"use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache", "batch_size"}
)
"""Keywords that every file system of fsspec takes, without naming them."""


class Client:
    """The clients of one GCS store. May be used from several threads."""

    def __init__(self, target: Target) -> None:
        options = target.options
        self.fs: Any = _file_system(options)
        self.endpoint = str(self.fs._location).rstrip("/")  # noqa: SLF001 - gcsfs has no other name for it
        self.route = Route(self.endpoint, SETTINGS, proxy_of(self.endpoint))
        """For errors and doctor."""
        self.paces = Throttles.of(connections(options))
        self._lock = threading.Lock()
        # A bucket whose requester pays wants to know who that is, with every request.
        payer = self.fs.requester_pays
        self._always = {"userProject": self.fs.project if payer is True else str(payer)} if payer else {}
        self.payer: Mapping[str, str] = (
            {_PAYER: self._always["userProject"]} if "userProject" in self._always else {}
        )
        """The header of a request of the XML API that says who pays."""
        self._pool = _pool(
            os.getpid(), self.route.proxy, self.endpoint, connections(options), options.timeout
        )

    @property
    def is_google(self) -> bool:
        """True if the endpoint is Google's own."""
        return is_google(self.endpoint)

    @property
    def serves_xml(self) -> bool:
        """True if the endpoint is known to serve the XML API."""
        return serves_xml(self.endpoint)

    @property
    def always(self) -> str:
        """The query that every request has."""
        return urlencode(self._always)

    def objects(self, bucket: str) -> str:
        """Return the path of a bucket's objects."""
        return f"/storage/v1/b/{quote(bucket, safe='')}/o"

    def request(
        self,
        doing: str,
        method: str,
        where: str,
        *,
        parameters: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: BuffersBody | bytes | None = None,
        fine: tuple[int, ...] = (),
        is_object: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        """Send a request and return its answer, whose body is still to be read.

        Args:
            doing: what it is to do, for errors.
            method: of HTTP.
            where: a path on the endpoint, or the URL of a session.
            parameters: of the query.
            headers: besides those that all have.
            body: what is sent.
            fine: statuses that are no failure, besides success.
            is_object: the body of the answer is an object's, of any length.

        Raises:
            RefusedError: it was answered with another status.
            PageError: a web page or a redirection was the answer.
            StorageError: ``where`` is a URL of another server. Nothing is sent.
        """
        use(self._pool, self)
        sent = {"User-Agent": f"cloudckpt/{__version__}", "Accept-Encoding": "identity", **(headers or {})}
        url = where if where.startswith("http") else f"{self.endpoint}{where}"
        if not is_of(url, self.endpoint):
            raise elsewhere(url, self.endpoint)
        if same_origin(url, self.endpoint):  # a token is for no other host
            self.fs.credentials.apply(sent)
        query = {**({} if _PAYER in sent else self._always), **(parameters or {})}
        if query:
            url += ("&" if "?" in url else "?") + urlencode(query, quote_via=quote)
        if body is not None:
            sent["Content-Length"] = str(len(body))
        bounded.expect(is_object=is_object)
        response = self._pool.urlopen(
            method, url, body=body, headers=sent, preload_content=False, decode_content=False, redirect=False
        )
        came, is_success = response.headers, response.status < 300  # noqa: PLR2004 - 308 is no redirection here
        is_foreign = response.status in _OF_OTHERS or (response.status == _REDIRECTION and not fine)
        if is_foreign or (is_success and _is_page(response)):
            response.close()
            raise PageError(doing, response.status, came.get("Location"))
        if is_success or response.status in fine:
            return response
        said = response.read(_ERROR_BYTES)
        if response.length_remaining == 0:
            response.release_conn()
        else:
            response.close()
        raise RefusedError(doing, response.status, said, came.get("Retry-After"), came.get("Date"))

    def renew(self) -> bool:
        """Get a new token, where the credentials can; whether there is one."""
        credentials = self.fs.credentials.credentials
        if credentials is None:
            return False
        with self._lock, requests.Session() as session:
            try:
                credentials.refresh(Request(session))
            except google.auth.exceptions.GoogleAuthError:
                return False
        return True

    def hold(self) -> None:
        """Keep connections open while this client lives, and is not closed."""
        use(self._pool, self)

    def close(self) -> None:
        """Close idle connections, unless another client uses them."""
        if release(self._pool, self):
            self._pool.clear()


def _file_system(options: Options) -> GCSFileSystem:
    endpoint = configured_endpoint(options)
    given = {name: value for name, value in options.storage_options.items() if name != "endpoint_url"}
    arguments: dict[str, Any] = {**given, "endpoint_url": endpoint, "use_listings_cache": False}
    if options.project:
        arguments["project"] = options.project
    if options.token is not None:
        arguments["token"] = options.token.get_secret_value()
    # Without encryption it is an emulator, to which no token of the user's should go.
    if options.anon or ("token" not in arguments and (endpoint or "https://").startswith("http://")):
        arguments["token"] = "anon"  # noqa: S105 - the name of a method
    known = _OF_FSSPEC.union(inspect.signature(GCSFileSystem.__init__).parameters)
    if unknown := sorted(arguments.keys() - known):
        raise ConfigurationError(f"gcsfs knows no {', '.join(unknown)} in storage_options")
    try:
        return GCSFileSystem(**arguments)
    except google.auth.exceptions.GoogleAuthError:
        raise
    except Exception as error:  # noqa: BLE001 - gcsfs asks Google about a token, in a URL that errors show
        raise ConfigurationError(
            f"gcsfs can't use the token or storage_options ({type(error).__name__})",
            hint=where_credentials_belong("gs"),
        ) from None


def _is_page(response: urllib3.BaseHTTPResponse) -> bool:
    """Tell a web page from an answer of GCS. One without a body may have the type of a page, too."""
    headers = response.headers
    is_html = headers.get("Content-Type", "").startswith("text/html")
    named = any(name.lower().startswith(("x-goog-", "x-guploader-")) for name in headers)
    return is_html and not named and headers.get("Content-Length") != "0"


@functools.lru_cache(maxsize=8)
def _pool(
    process: int, proxy: Proxy | None, endpoint: str, concurrency: int, timeout: float
) -> urllib3.PoolManager:
    """Return connections to one server, kept from one save or load to the next."""
    del process  # one that was forked must not use its parent's, nor one server another's
    settings: dict[str, Any] = {
        "maxsize": max(concurrency, ON_BEHALF) + 2,
        "blocksize": _ASKED,
        "retries": False,
        "timeout": urllib3.Timeout(connect=min(_CONNECT_SECONDS, timeout), read=timeout),
    }
    if endpoint.startswith("https:"):
        settings["ssl_context"] = context = create_urllib3_context()  # one for all: its sessions are resumed
        context.load_default_certs()
    if proxy is None:
        manager = urllib3.PoolManager(**settings)
    else:
        proxy_headers = {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}
        manager = urllib3.ProxyManager(proxy.url, proxy_headers=proxy_headers, **settings)
    manager.pool_classes_by_scheme = POOLS
    return manager
