"""Connections to an S3 server for small requests by the thousand: http.client's.

Those of botocore, which carry everything else, take as long for such a request as all the rest of it. What
they offer beyond (proxies, client certificates, unverified TLS) is left to them.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import weakref
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

from botocore import exceptions as boto
from urllib3.util import wait_for_read

from cloudckpt.backends.stores.http import bounded, tls_sessions
from cloudckpt.backends.stores.http.proxies import Proxy
from cloudckpt.backends.stores.http.server_addresses import addresses_of
from cloudckpt.backends.stores.http.tls import context as tls_context

_Idle: TypeAlias = "defaultdict[tuple[str, str], deque[_Connection]]"
"""By scheme and network location."""
_OPTIONS: Final = ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),)
_LEFT_TO_BOTOCORE: Final = ("proxies", "client_cert", "tcp_keepalive")
"""Settings of a client that these connections do without."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a server."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


class _Connection(http.client.HTTPConnection):
    """Sends the head of a request and its body as one packet, which saves both sides a tenth."""

    response_class = bounded.Response

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._held: list[bytes] = []

    def send(self, data: Any) -> None:
        self._held.append(data)

    def flush(self) -> None:
        """Send what there is to send."""
        whole = b"".join(self._held)
        self._held.clear()
        super().send(whole)

    def connect(self) -> None:
        self.sock = addresses_of(self.host, self.port).connect(self.timeout, options=_OPTIONS)


class _TLSConnection(_Connection):
    default_port = http.client.HTTPS_PORT

    def __init__(self, *args: Any, context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(*args, **options)
        self._tls = context

    def connect(self) -> None:
        super().connect()
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)


class Connections:
    """Keeps connections and lends each to one thread at a time.

    Args:
        config: botocore's, of the client in whose stead they are used.
        verify: what botocore calls so: a file or folder of authorities, or True for the host's own.
        proxy: what botocore's requests go through.
    """

    def __init__(self, config: Any, verify: bool | str, proxy: Proxy | None = None) -> None:
        self._config = config
        self._verify = verify
        self._proxy = proxy
        self._tls: ssl.SSLContext | None = None
        self._idle: _Idle = defaultdict(deque)
        weakref.finalize(self, _close, self._idle)

    def reach(self, url: str) -> bool:
        """Return True if the settings allow a request to this URL's host without botocore."""
        parts = urlsplit(url)
        by_proxy = self._proxy is not None
        unusual = by_proxy or "@" in parts.netloc or any(getattr(self._config, s) for s in _LEFT_TO_BOTOCORE)
        return not unusual and (parts.scheme == "http" or self._verify is not False)

    def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Send one request and read its answer whole.

        Raises:
            HTTPClientError: botocore's, as its own connections raise them.
        """
        parts = urlsplit(url)
        connection = self._borrowed(parts.scheme, parts.netloc, url)
        whole = False
        try:
            bounded.expect(is_object=False)
            with _as_botocores(url):
                sock = connection.sock
                connection.request("POST", f"{parts.path}?{parts.query}", body, headers)
                connection.flush()
                # An answer that ends its connection is not closed with it.
                with contextlib.closing(connection.getresponse()) as response:
                    answer = Answer(response.status, response.headers, response.read())
            tls_sessions.keep(sock)
            whole = not response.will_close
        finally:
            self._give_back((parts.scheme, parts.netloc), connection, whole=whole)
        return answer

    def close(self) -> None:
        """Close idle connections; new ones are opened as soon as they are needed."""
        _close(self._idle)

    def _borrowed(self, scheme: str, netloc: str, url: str) -> _Connection:
        idle = self._idle[scheme, netloc]
        with contextlib.suppress(IndexError):
            while True:
                connection = idle.pop()
                # What can be read now is no answer: the server has closed it.
                if not wait_for_read(connection.sock, timeout=0.0):
                    return connection
                connection.close()
        return self._connected(scheme, netloc, url)

    def _connected(self, scheme: str, netloc: str, url: str) -> _Connection:
        seconds = self._config.connect_timeout
        try:
            if scheme == "https":
                self._tls = self._tls or tls_context(self._verify)
                tls_sessions.resume(self._tls)
                connection: _Connection = _TLSConnection(netloc, timeout=seconds, context=self._tls)
            else:
                connection = _Connection(netloc, timeout=seconds)
            connection.connect()
            connection.sock.settimeout(self._config.read_timeout)
        except ssl.SSLError as error:
            raise boto.SSLError(endpoint_url=url, error=error) from error
        except TimeoutError as error:
            raise boto.ConnectTimeoutError(endpoint_url=url, error=error) from error
        except OSError as error:
            raise boto.EndpointConnectionError(endpoint_url=url, error=error) from error
        return connection

    def _give_back(self, place: tuple[str, str], connection: _Connection, *, whole: bool) -> None:
        idle = self._idle[place]
        if whole and len(idle) < self._config.max_pool_connections:
            idle.append(connection)
        else:
            connection.close()


def _close(idle: _Idle) -> None:
    for connections in list(idle.values()):
        with contextlib.suppress(IndexError):
            while True:
                connections.pop().close()


@contextlib.contextmanager
def _as_botocores(url: str) -> Iterator[None]:
    """Raise what botocore would, of a request that went out."""
    try:
        yield
    except ssl.SSLError as error:
        raise boto.SSLError(endpoint_url=url, error=error) from error
    except TimeoutError as error:
        raise boto.ReadTimeoutError(endpoint_url=url, error=error) from error
    except (http.client.HTTPException, OSError) as error:
        raise boto.ConnectionClosedError(endpoint_url=url, error=error) from error
