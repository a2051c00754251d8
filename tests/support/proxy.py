"""A proxy before an S3 server that keeps every request as it arrived, and spoils those it is told to.

    with proxied(server.endpoint) as proxy:
        proxy.spoil("UploadPart", [Answer(503, "SlowDown"), LoseAnswer()])

The first part sent is answered 503, the second reaches the server but its answer is lost, the rest pass.
Nothing is mocked: requests and answers cross real sockets, and what passes is done by the real server.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

_HOST = "127.0.0.1"
_UPSTREAM_SECONDS = 60.0
_STALL_SECONDS = 60.0
_OF_A_CONNECTION = frozenset(
    {"connection", "content-length", "transfer-encoding", "date", "server", "expect"}
)


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer in the server's place, which never hears of the request."""

    status: int
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CutRequest:
    """Cut the connection after so many bytes of the request's body."""

    after: int


@dataclass(frozen=True, slots=True)
class LoseAnswer:
    """Let the server act, then cut the connection."""


@dataclass(frozen=True, slots=True)
class CutAnswer:
    """Cut the connection after so many bytes of the answer's body."""

    after: int


@dataclass(frozen=True, slots=True)
class StallAnswer:
    """Stop sending after so many bytes of the answer's body and hold the connection."""

    after: int


@dataclass(frozen=True, slots=True)
class Stall:
    """Hold the connection and say nothing; the server never hears of the request."""


@dataclass(frozen=True, slots=True)
class FlipBit:
    """Change one bit of the request's body on its way."""


Spoiling = Answer | CutRequest | LoseAnswer | CutAnswer | StallAnswer | Stall | FlipBit | None


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrived."""

    method: str
    target: str
    """Path and query."""
    headers: Mapping[str, str]
    """By lower-case name."""
    body: bytes = field(repr=False)
    """What arrived of it."""

    @property
    def operation(self) -> str:
        """The name of the S3 operation."""
        split = urlsplit(self.target)
        query = parse_qs(split.query, keep_blank_values=True)
        if not split.path.lstrip("/").partition("/")[2]:
            listing = "ListMultipartUploads" if "uploads" in query else "ListObjectsV2"
            return "DeleteObjects" if "delete" in query else listing
        multipart = {
            "POST": "CreateMultipartUpload" if "uploads" in query else "CompleteMultipartUpload",
            "PUT": "UploadPart",
            "DELETE": "AbortMultipartUpload",
        }
        if query.keys() & {"uploads", "uploadId"}:
            return multipart[self.method]
        return {"GET": "GetObject", "HEAD": "HeadObject", "PUT": "PutObject", "DELETE": "DeleteObject"}[
            self.method
        ]


class Proxy:
    """What the proxy saw and is still to spoil. Safe to use from several threads."""

    def __init__(self, endpoint: str, upstream: str) -> None:
        self.endpoint = endpoint
        """URL without a trailing slash."""
        self.upstream = upstream
        self.released = threading.Event()
        self._lock = threading.Lock()
        self._seen: list[Request] = []
        self._spoilings: dict[str, Iterator[Spoiling]] = {}

    def spoil(self, operation: str, spoilings: Iterable[Spoiling]) -> None:
        """Spoil the next requests of an operation, one after another; None lets one pass."""
        with self._lock:
            self._spoilings[operation] = iter(spoilings)

    def seen(self, operation: str) -> Sequence[Request]:
        """Return the requests of an operation so far."""
        with self._lock:
            return [request for request in self._seen if request.operation == operation]

    @property
    def count(self) -> int:
        """How many requests arrived so far, of any operation."""
        with self._lock:
            return len(self._seen)

    def forget(self) -> None:
        """Forget what was seen and what was to be spoilt."""
        with self._lock:
            self._seen.clear()
            self._spoilings.clear()

    def next_for(self, request: Request) -> Spoiling:
        """Return what to do with the request."""
        with self._lock:
            return next(self._spoilings.get(request.operation, iter(())), None)

    def keep(self, request: Request) -> None:
        """Note that the request arrived."""
        with self._lock:
            self._seen.append(request)


@contextlib.contextmanager
def proxied(upstream: str, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """Run a proxy before the server at ``upstream``; with ``tls`` it speaks https to its clients."""
    with _Server((_HOST, 0), _Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        scheme = "http" if tls is None else "https"
        server.proxy = proxy = Proxy(f"{scheme}://{_HOST}:{server.server_port}", upstream)
        thread = threading.Thread(target=server.serve_forever, name="proxy")
        thread.start()
        try:
            yield proxy
        finally:
            proxy.released.set()
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    proxy: Proxy


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        assert isinstance(self.server, _Server)
        self.proxy = self.server.proxy

    def _handle(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = int(headers.get("content-length", 0))
        spoiling = self.proxy.next_for(Request(self.command, self.path, headers, b""))
        wanted = min(length, spoiling.after) if isinstance(spoiling, CutRequest) else length
        request = Request(self.command, self.path, headers, self.rfile.read(wanted))
        self.proxy.keep(request)
        match spoiling:
            case Answer():
                self._send(spoiling.status, dict(spoiling.headers), _document(spoiling.code))
            case CutRequest():
                self.close_connection = True
            case Stall():
                self._hold()
            case LoseAnswer():
                self._ask(request)
                self.close_connection = True
            case FlipBit():
                body = bytearray(request.body)
                body[len(body) // 2] ^= 1
                self._send(*self._ask(Request(request.method, request.target, headers, bytes(body))))
            case CutAnswer(after) | StallAnswer(after):
                self._send(*self._ask(request), after=after)
                if isinstance(spoiling, StallAnswer):
                    self._hold()
                self.close_connection = True
            case None:
                self._send(*self._ask(request))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815 - the base class names them

    def _ask(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        """Let the real server answer."""
        upstream = urlsplit(self.proxy.upstream)
        connection = http.client.HTTPConnection(
            upstream.hostname or "", upstream.port, timeout=_UPSTREAM_SECONDS
        )
        passed = {name: value for name, value in request.headers.items() if name not in _OF_A_CONNECTION}
        passed["content-length"] = str(len(request.body))
        with contextlib.closing(connection):
            connection.request(request.method, request.target, request.body, passed)
            answer = connection.getresponse()
            headers = dict(answer.getheaders())
            return answer.status, headers, answer.read()

    def _send(self, status: int, headers: dict[str, str], body: bytes, after: int | None = None) -> None:
        self.send_response(status)
        told = next((value for name, value in headers.items() if name.lower() == "content-length"), "")
        for name, value in headers.items():
            if name.lower() not in _OF_A_CONNECTION:
                self.send_header(name, value)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", (told or "0") if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:after])
            self.wfile.flush()

    def _hold(self) -> None:
        self.proxy.released.wait(_STALL_SECONDS)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        """Stay silent."""


def _document(code: str) -> bytes:
    if not code:
        return b""
    text = f"<Error><Code>{code}</Code><Message>as the test asked</Message></Error>"
    return b'<?xml version="1.0" encoding="UTF-8"?>\n' + text.encode()
