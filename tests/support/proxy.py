"""A proxy before an S3 or GCS server that keeps every request as it arrived, and spoils some of them.

    with proxied(server.endpoint) as proxy:
        proxy.spoil("UploadPart", [Answer(503, "SlowDown"), LoseAnswer()])

The first part sent is answered 503, the second reaches the server but its answer is lost, the rest pass.
Nothing is mocked: requests and answers cross real sockets, and what passes is done by the real server.
``proxy.rule`` decides on every other request; ``support.transient_errors`` has some rules.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

_HOST = "127.0.0.1"
_UPSTREAM_SECONDS = 60.0
_STALL_SECONDS = 60.0
MOST_PIECES = 400
"""Pieces that a trickling answer or request has at most."""
_OF_A_CONNECTION = frozenset(
    {"connection", "content-length", "transfer-encoding", "date", "server", "expect"}
)


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer in the server's place, which never hears of the request."""

    status: int
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, str] = field(default_factory=dict)
    """Elements of the error document beside code and message."""


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """Answer these bytes in the server's place, whether or not they are HTTP, and cut the connection."""

    data: bytes


@dataclass(frozen=True, slots=True)
class AddHeaders:
    """Let the server act, and add headers to its answer, or put them in the place of its own."""

    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DropHeaders:
    """Let the server act, and leave headers out of its answer, given in lower case."""

    names: Sequence[str]


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
class HalveAnswer:
    """Cut the connection in the middle of the answer's body, or before the answer where it has none."""


@dataclass(frozen=True, slots=True)
class EditAnswer:
    """Replace some bytes of the answer's body by others."""

    old: bytes
    new: bytes


@dataclass(frozen=True, slots=True)
class StallAnswer:
    """Stop sending after so many bytes of the answer's body and hold the connection."""

    after: int


@dataclass(frozen=True, slots=True)
class Stall:
    """Hold the connection and say nothing; the server never hears of the request."""


@dataclass(frozen=True, slots=True)
class Trickle:
    """Send these bytes in the server's place, then more of them again and again, a piece at a time.

    It ends with the connection, or after so many pieces that no client should wait for.
    """

    data: bytes
    piece: bytes = b" "
    seconds: float = 0.05
    """Between two pieces."""


@dataclass(frozen=True, slots=True)
class Sip:
    """Take the body of the request byte by byte, and answer nothing."""

    seconds: float = 0.05
    """Between two bytes."""


@dataclass(frozen=True, slots=True)
class Delay:
    """Let the server act, and answer so many seconds late."""

    seconds: float


@dataclass(frozen=True, slots=True)
class DenyMissing:
    """Let the server act, and answer 403 in place of its 404, as S3 does to a caller that may not list."""


@dataclass(frozen=True, slots=True)
class SendAs:
    """Let the server act on another path and query, under its own name as the host."""

    target: str


@dataclass(frozen=True, slots=True)
class FlipBit:
    """Change one bit of the request's body on its way."""


Spoiling = (
    Answer
    | RawAnswer
    | AddHeaders
    | DropHeaders
    | CutRequest
    | LoseAnswer
    | CutAnswer
    | HalveAnswer
    | EditAnswer
    | StallAnswer
    | Stall
    | Trickle
    | Sip
    | Delay
    | DenyMissing
    | SendAs
    | FlipBit
    | None
)


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
        """The name of the S3 operation; for GCS, of the one that does the same there."""
        split = urlsplit(self.target)
        query = parse_qs(split.query, keep_blank_values=True)
        if _OF_GCS.match(split.path):
            return _gcs_operation(self.method, split.path, query)
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


_OF_GCS = re.compile(r"/(?:storage|(?:upload|download|batch)/storage)/v1(?:/|$)")


def _gcs_operation(method: str, path: str, query: Mapping[str, Sequence[str]]) -> str:
    if path.startswith("/batch/"):
        return "DeleteObjects"
    if "upload_id" in query:
        return {"PUT": "UploadPart", "DELETE": "AbortMultipartUpload"}[method]
    if path.startswith("/upload/"):
        return "CreateMultipartUpload" if "resumable" in query["uploadType"] else "PutObject"
    if path.endswith("/o"):
        return "ListObjectsV2"
    if method == "POST" and "/rewriteTo/" in path:
        return "CopyObject"
    return {"GET": "GetObject", "DELETE": "DeleteObject"}[method]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and the times between which the client waited for its answer, by the monotonic clock."""

    request: Request
    began: float
    """When its head had arrived."""
    ended: float
    """When its answer was about to be sent."""


Rule = Callable[[Request], Spoiling]
"""Decides over a request before its body is read; called from several threads."""


class Proxy:
    """What the proxy saw and is still to spoil. Safe to use from several threads."""

    def __init__(self, endpoint: str, upstream: str) -> None:
        self.endpoint = endpoint
        """URL without a trailing slash."""
        self.upstream = upstream
        self.clock = 0.0
        """Seconds that the clock of this server is ahead."""
        self.released = threading.Event()
        self._lock = threading.Lock()
        self._seen: list[Request] = []
        self._exchanges: list[Exchange] = []
        self._spoilings: dict[str, Iterator[Spoiling]] = {}
        self._rule: Rule | None = None
        self._in_flight = 0
        self.trickled: list[int] = []
        """Pieces of each trickling answer that has ended."""
        self.sipped: list[int] = []
        """Bytes of each request that was taken byte by byte, once that has ended."""

    def ended(self) -> list[int]:
        """Return the pieces of each trickling answer or request so far, once all of them have ended."""
        deadline = time.monotonic() + _STALL_SECONDS
        while self.in_flight and time.monotonic() < deadline:
            time.sleep(0.01)
        return list(self.trickled)

    @property
    def exchanges(self) -> list[Exchange]:
        """Requests that were answered, in the order of their answers."""
        with self._lock:
            return list(self._exchanges)

    def answered(self, exchange: Exchange) -> None:
        """Note that a request is answered now."""
        with self._lock:
            self._exchanges.append(exchange)

    @property
    def in_flight(self) -> int:
        """Requests that have arrived and are not answered yet."""
        with self._lock:
            return self._in_flight

    def rule(self, decide: Rule | None) -> None:
        """Have ``decide`` say what to do with every request for which ``spoil`` says nothing."""
        with self._lock:
            self._rule = decide

    def spoil(self, operation: str, spoilings: Iterable[Spoiling]) -> None:
        """Spoil the next requests of an operation, one after another; None lets one pass."""
        with self._lock:
            self._spoilings[operation] = iter(spoilings)

    def seen(self, operation: str) -> Sequence[Request]:
        """Return the requests of an operation so far."""
        with self._lock:
            return [request for request in self._seen if request.operation == operation]

    def all(self) -> Sequence[Request]:
        """Return every request so far."""
        with self._lock:
            return list(self._seen)

    @property
    def count(self) -> int:
        """How many requests arrived so far, of any operation."""
        with self._lock:
            return len(self._seen)

    def forget(self) -> None:
        """Forget what was seen and what was to be spoilt."""
        with self._lock:
            self._seen.clear()
            self._exchanges.clear()
            self._spoilings.clear()
            self._rule = None
            self.clock = 0.0
            self.trickled, self.sipped = [], []

    def next_for(self, request: Request) -> Spoiling:
        """Return what to do with the request."""
        with self._lock:
            rule = self._rule
            spoilings = self._spoilings.get(request.operation)
            for spoiling in spoilings or ():
                return spoiling
        return rule(request) if rule is not None else None

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a request as in flight during the block."""
        with self._lock:
            self._in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1

    def keep(self, request: Request) -> None:
        """Note that the request arrived."""
        with self._lock:
            self._seen.append(request)


@contextlib.contextmanager
def proxied(upstream: str, tls: ssl.SSLContext | None = None, port: int = 0) -> Iterator[Proxy]:
    """Run a proxy before the server at ``upstream``; with ``tls`` it speaks https to its clients."""
    with _Server((_HOST, port), _Handler) as server:
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

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent about clients that did not wait for their answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the client to acknowledge the headers

    def setup(self) -> None:
        super().setup()
        assert isinstance(self.server, _Server)
        self.proxy = self.server.proxy

    def _handle(self) -> None:
        with self.proxy.counted():
            self._answer()

    def _answer(self) -> None:
        self._began = time.monotonic()
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = int(headers.get("content-length", 0))
        spoiling = self.proxy.next_for(Request(self.command, self.path, headers, b""))
        if isinstance(spoiling, Sip):
            self.proxy.keep(Request(self.command, self.path, headers, b""))
            self._trickle(lambda: self.rfile.read(1) and True, spoiling.seconds, self.proxy.sipped)
            return
        wanted = min(length, spoiling.after) if isinstance(spoiling, CutRequest) else length
        request = Request(self.command, self.path, headers, self.rfile.read(wanted))
        self.proxy.keep(request)
        self._request = request
        match spoiling:
            case Answer():
                self._send(spoiling.status, dict(spoiling.headers), _document(spoiling))
            case RawAnswer(data):
                self.wfile.write(data)
                self.close_connection = True
            case CutRequest():
                self.close_connection = True
            case Trickle(data, piece, seconds):
                self.wfile.write(data)
                self._trickle(lambda: self.wfile.write(piece), seconds, self.proxy.trickled)
            case Stall():
                self._hold()
            case _:
                self._pass_on(request, spoiling)

    def _pass_on(self, request: Request, spoiling: Spoiling) -> None:
        """Let the server act, and do to its answer what was asked."""
        status, headers, answer = self._ask(_changed(request, spoiling))
        match spoiling:
            case LoseAnswer():
                self.close_connection = True
            case HalveAnswer():
                if answer and self.command != "HEAD":
                    self._send(status, headers, answer, after=len(answer) // 2)
                self.close_connection = True
            case DenyMissing() if status == HTTPStatus.NOT_FOUND:
                self._send(HTTPStatus.FORBIDDEN, {}, _document(Answer(403, "AccessDenied")))
            case EditAnswer(old, new):
                self._send(status, headers, answer.replace(old, new))
            case AddHeaders() | DropHeaders():
                self._send(status, _other_headers(headers, spoiling), answer)
            case CutAnswer(after) | StallAnswer(after):
                self._send(status, headers, answer, after=after)
                if isinstance(spoiling, StallAnswer):
                    self._hold()
                self.close_connection = True
            case _:
                if isinstance(spoiling, Delay):
                    time.sleep(spoiling.seconds)
                self._send(status, headers, answer)

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
            with contextlib.closing(connection.getresponse()) as answer:
                return answer.status, dict(answer.getheaders()), answer.read()

    def _send(self, status: int, headers: dict[str, str], body: bytes, after: int | None = None) -> None:
        self.proxy.answered(Exchange(self._request, self._began, time.monotonic()))
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

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string((timestamp or time.time()) + self.proxy.clock)

    def _hold(self) -> None:
        self.proxy.released.wait(_STALL_SECONDS)
        self.close_connection = True

    def _trickle(self, once: Callable[[], object], seconds: float, counts: list[int]) -> None:
        """Do it again and again, until the client has ended the connection."""
        self.close_connection = True
        count = 0
        try:
            while count < MOST_PIECES and not self.proxy.released.is_set() and once():
                count += 1
                time.sleep(seconds)
        except OSError:
            pass
        finally:
            counts.append(count)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        """Stay silent."""


def _changed(request: Request, spoiling: Spoiling) -> Request:
    """Return what the server is sent in the place of a request."""
    if isinstance(spoiling, FlipBit):
        body = bytearray(request.body)
        body[len(body) // 2] ^= 1
        return Request(request.method, request.target, request.headers, bytes(body))
    if isinstance(spoiling, SendAs):
        headers = {name: value for name, value in request.headers.items() if name != "host"}
        return Request(request.method, spoiling.target, headers, request.body)
    return request


def _other_headers(headers: Mapping[str, str], change: AddHeaders | DropHeaders) -> dict[str, str]:
    """Return the headers of an answer with some added or left out."""
    more = change.headers if isinstance(change, AddHeaders) else {}
    left_out = more if isinstance(change, AddHeaders) else change.names
    return {**{name: value for name, value in headers.items() if name.lower() not in left_out}, **more}


def _document(answer: Answer) -> bytes:
    if not answer.code:
        return b""
    more = "".join(f"<{name}>{value}</{name}>" for name, value in answer.more.items())
    text = f"<Error><Code>{answer.code}</Code><Message>as the test asked</Message>{more}</Error>"
    return b'<?xml version="1.0" encoding="UTF-8"?>\n' + text.encode()
