"""How urllib3's connections reach a server: over all of its addresses, and resuming TLS sessions.

This is the one place that uses these private names: ``_new_conn`` and ``_dns_host`` of urllib3's connections,
since urllib3 1.24, and ``_manager`` and ``_pool_classes_by_scheme`` of botocore's HTTP session, since 1.11.
Where a version has them no more, connections are opened as that library does it.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Mapping
from typing import Any

from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from cloudckpt.backends import background_log
from cloudckpt.backends.stores.http import tls_sessions
from cloudckpt.backends.stores.http.addresses import addresses_of

_log = background_log.logger(__name__)


def spread(manager: Any) -> None:
    """Have the pools that a manager of urllib3 makes from now on reach a server over all of its addresses."""
    manager.pool_classes_by_scheme = _reaching(manager.pool_classes_by_scheme)


def spread_client(client: Any) -> None:
    """Do as `spread` with a client of botocore, whose HTTP session also makes managers for proxies."""
    try:
        session = client._endpoint.http_session  # noqa: SLF001
        manager, classes = session._manager, session._pool_classes_by_scheme  # noqa: SLF001
    except AttributeError as error:
        _log.debug("botocore has no %s any more: connections are opened by its own code", error.name)
        return
    classes.update(_reaching(classes))
    manager.pool_classes_by_scheme = classes


def _reaching(classes: Mapping[str, Any]) -> dict[str, Any]:
    return {scheme: _pool_class(of_pool) for scheme, of_pool in classes.items()}


@functools.cache
def _pool_class(of_pool: Any) -> Any:
    """Return a class of pools like this one, of connections that are `Reaching`."""
    of_connection = of_pool.ConnectionCls
    if issubclass(of_connection, Reaching):
        return of_pool
    reaching = type(f"Reaching{of_connection.__name__}", (Reaching, of_connection), {})
    return type(f"Reaching{of_pool.__name__}", (of_pool,), {"ConnectionCls": reaching})


class Reaching:
    """A mixin for urllib3's connections, put before their class. With a proxy, the proxy is reached."""

    host: str
    port: int
    timeout: Any
    source_address: Any
    socket_options: Any
    sock: Any
    ssl_context: Any = None
    _is_kept = False
    """True once the TLS session of this connection was kept."""

    def connect(self) -> None:
        """Connect, resuming a TLS session."""
        tls_sessions.resume(self.ssl_context)
        self._is_kept = False
        super().connect()  # type: ignore[misc]

    def getresponse(self) -> Any:
        """Read the head of an answer, and keep the TLS session, whose ticket has come before it."""
        sock = self.sock  # which is gone afterwards where the server ends the connection
        response = super().getresponse()  # type: ignore[misc]
        if not self._is_kept:
            self._is_kept = True
            tls_sessions.keep(sock)
        return response

    def _new_conn(self) -> socket.socket:
        """Return a connected socket, or raise urllib3's errors."""
        connection: Any = self
        host = getattr(self, "_dns_host", self.host)
        timeout = self.timeout if isinstance(self.timeout, int | float) else socket.getdefaulttimeout()
        try:
            return addresses_of(host, self.port).connect(
                timeout, self.source_address, self.socket_options or ()
            )
        except socket.gaierror as error:
            raise NameResolutionError(self.host, connection, error) from error
        except TimeoutError as error:
            raise ConnectTimeoutError(
                connection, f"Connection to {self.host} timed out. (connect timeout={self.timeout})"
            ) from error
        except OSError as error:
            raise NewConnectionError(connection, f"Failed to establish a new connection: {error}") from error
