"""Connect urllib3's connections to all addresses of a server, and resume TLS sessions.

This is the one place that uses these private names: ``_new_conn`` and ``_dns_host`` of urllib3's connections,
since urllib3 1.24. Where a version has them no more, connections are opened as urllib3 does it.
"""

from __future__ import annotations

import socket
from typing import Any

from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from cloudckpt.backends.stores.http import tls_sessions
from cloudckpt.backends.stores.http.server_addresses import addresses_of


class Reaching:
    """A mixin for urllib3's connections, put before their class. With a proxy, the proxy is reached."""

    sock: Any
    _is_kept = False
    """True once the TLS session of this connection was kept."""

    def connect(self) -> None:
        """Connect, resuming a TLS session."""
        tls_sessions.resume(getattr(self, "ssl_context", None))
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
        it: Any = self
        host = getattr(it, "_dns_host", it.host)
        timeout = it.timeout if isinstance(it.timeout, int | float) else socket.getdefaulttimeout()
        try:
            return addresses_of(host, it.port).connect(timeout, it.source_address, it.socket_options or ())
        except socket.gaierror as error:
            raise NameResolutionError(it.host, it, error) from error
        except TimeoutError as error:
            raise ConnectTimeoutError(
                it, f"Connection to {it.host} timed out. (connect timeout={it.timeout})"
            ) from error
        except OSError as error:
            raise NewConnectionError(it, f"Failed to establish a new connection: {error}") from error
