"""How urllib3's connections reach a server: over all of its addresses, and resuming TLS sessions.

This is the one place that uses these private names: ``_new_conn`` and ``_dns_host`` of urllib3's connections,
since urllib3 1.24. Where a version has them no more, connections are opened as urllib3 does it.
"""

from __future__ import annotations

import socket
from typing import Any

from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from cloudckpt.backends.stores.http import tls_sessions
from cloudckpt.backends.stores.http.addresses import addresses_of


class Reaching:
    """A mixin for urllib3's connections, put before their class. With a proxy, the proxy is reached."""

    host: Any
    port: Any
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
