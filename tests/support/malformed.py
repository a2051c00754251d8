"""Answers that are no HTTP, or not those of a store, as bytes on the wire.

The latter say that the connection ends, or a client might send its next request on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

NOT_HTTP: Final[Mapping[str, tuple[bytes, str]]] = {
    "two lengths": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nabcde",
        "Content-Length",
    ),
    "a status that is no number": (b"HTTP/1.1 abc OK\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 abc OK"),
    "a header line too long": (
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 100_000 + b"\r\nContent-Length: 0\r\n\r\n",
        "LineTooLong",
    ),
    "too many headers": (
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: 1\r\n" % number for number in range(1000)) + b"\r\n",
        "headers",
    ),
    "a body alone": (b"<html>hello</html>\n", "<html>hello</html>"),
    "the banner of SSH": (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH-2.0-OpenSSH_9.6"),
    "an alert of TLS": (b"\x15\x03\x01\x00\x02\x02\x16", ""),
}
"""Bytes, and a word of the parser's own complaint."""

_PAGE: Final = b"<!DOCTYPE html><html>" + b"please log in " * 1000 + b"</html>"
NOT_A_STORE: Final[Mapping[str, tuple[bytes, str]]] = {
    "a login page": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
        % (len(_PAGE), _PAGE),
        "status 200",
    ),
    "a proxy's demand": (
        b"HTTP/1.1 407 Who\r\nConnection: close\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nno",
        "status 407",
    ),
}
"""Bytes, and a word of the error."""


def redirection(url: str) -> bytes:
    """Return an answer that sends the client to a URL."""
    return f"HTTP/1.1 302 Found\r\nLocation: {url}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()
