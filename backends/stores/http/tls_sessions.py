"""TLS sessions that new connections resume: a handshake without certificates, for less CPU.

A session belongs to a context, and with it to its authorities and client certificate, and to a server's name.
With TLS 1.3 a server sends its tickets after the handshake: they are there once an answer has been read.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import weakref
from typing import Any

_lock = threading.Lock()
_kept: weakref.WeakKeyDictionary[ssl.SSLContext, dict[str, ssl.SSLSession]] = weakref.WeakKeyDictionary()


class ResumingSocket(ssl.SSLSocket):
    """A TLS connection that resumes the last session of its context with the same server."""

    def do_handshake(self, block: bool = False) -> None:
        with _lock:
            session = _kept.get(self.context, {}).get(self.server_hostname or "")
        if session is not None:
            with contextlib.suppress(ValueError):  # the handshake has started, without blocking
                self.session = session
        super().do_handshake(block)


def resume(context: ssl.SSLContext | None) -> None:
    """Have new connections of a context resume the sessions that `keep` was given."""
    if context is not None and context.sslsocket_class is ssl.SSLSocket:
        context.sslsocket_class = ResumingSocket
        context.options &= ~ssl.OP_NO_TICKET  # which urllib3 and botocore set for TLS 1.2


def keep(sock: Any) -> None:
    """Keep the session of a connection over which an answer was read, if it can be resumed."""
    if isinstance(sock, ResumingSocket):
        session = sock.session
        if session is not None and (session.has_ticket or sock.version() != "TLSv1.3"):
            with _lock:
                _kept.setdefault(sock.context, {})[sock.server_hostname or ""] = session
