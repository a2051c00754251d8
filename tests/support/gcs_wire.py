"""The forms that requests to Google Cloud Storage and their answers have on the wire."""

from __future__ import annotations

import base64
import binascii
import email.parser
import functools
import io
import json
import mmap
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from email.message import Message
from email.utils import format_datetime, formatdate
from http.client import responses
from urllib.parse import parse_qsl, unquote

from support.gcs_objects import Json, Refusal, Stored, Sums, invalid
from support.gcs_state import Chunk

_LARGE = 1 << 20
_MOST_CALLS = 100
_CALLS = frozenset({"GET", "DELETE"})
_PHRASES = {**responses, 308: "Resume Incomplete", 499: "Client Closed Request"}


@dataclass(frozen=True)
class Request:
    """A request whose body has come, or as much of it as will."""

    method: str
    target: str
    headers: Message
    body: memoryview
    length: int
    """Of the body, as it was announced."""

    @functools.cached_property
    def segments(self) -> Sequence[str]:
        """The path's names, decoded one by one: a slash of a name comes as %2F."""
        try:
            return [unquote(part, errors="strict") for part in self.target.partition("?")[0].split("/")[1:]]
        except UnicodeDecodeError:
            raise invalid("The path is not UTF-8") from None

    @functools.cached_property
    def query(self) -> Mapping[str, str]:
        try:
            pairs = parse_qsl(self.target.partition("?")[2], keep_blank_values=True, errors="strict")
        except UnicodeDecodeError:
            raise invalid("The query is not UTF-8") from None
        return dict(pairs)

    def json(self) -> Json:
        return parsed_json(self.body)


@dataclass(frozen=True, slots=True)
class Answer:
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Sequence[memoryview] = ()

    @property
    def head(self) -> bytes:
        """Everything before the body."""
        size = sum(map(len, self.body))
        # What has no body by its status says nothing of its length either.
        length = {} if self.status in (204, 304) else {"Content-Length": str(size)}
        lines = [f"HTTP/1.1 {self.status} {_PHRASES.get(self.status, 'Unknown')}"]
        lines.append(f"Date: {formatdate(usegmt=True)}")
        lines += [f"{name}: {value}" for name, value in {**self.headers, **length}.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


def in_json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    page = memoryview(json.dumps(value).encode())
    return Answer(status, {"Content-Type": "application/json; charset=UTF-8", **(headers or {})}, [page])


def refused(refusal: Refusal, headers: Mapping[str, str] | None = None) -> Answer:
    """Return Google's JSON for an error, or plain text for one without a reason."""
    if refusal.status == 304:
        return Answer(304, headers or {})
    if not refusal.reason:
        text = memoryview(refusal.message.encode())
        return Answer(
            refusal.status, {"Content-Type": "text/plain; charset=utf-8", **(headers or {})}, [text]
        )
    reason = {"reason": refusal.reason, "message": refusal.message, "domain": "global"}
    error = {"code": refusal.status, "message": refusal.message, "errors": [reason]}
    return in_json({"error": error}, refusal.status, headers)


def media(stored: Stored, asked: str | None) -> Answer:
    """Return an object's bytes, or those of the one range that was asked for."""
    content = stored.content
    md5 = [f"md5={content.md5}"] if stored.has_md5 else []
    headers = {
        "Content-Type": str(stored.fields.get("contentType", "application/octet-stream")),
        "ETag": stored.etag,
        "Last-Modified": format_datetime(datetime.fromisoformat(stored.created), usegmt=True),
        "x-goog-generation": str(stored.generation),
        "x-goog-metageneration": "1",
        "x-goog-stored-content-length": str(content.size),
        "x-goog-storage-class": "STANDARD",
        "x-goog-hash": ",".join([f"crc32c={content.crc32c}", *md5]),
    }
    found = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", asked or "")
    if found is None or (found[2] and int(found[2]) < int(found[1])):
        return Answer(200, headers, content.pieces)
    start = max(content.size - int(found[3]), 0) if found[3] else int(found[1])
    stop = min(int(found[2]) + 1, content.size) if found[2] else content.size
    if start >= stop:
        refusal = Refusal(416, "requestedRangeNotSatisfiable", "Request range not satisfiable")
        return refused(refusal, {"Content-Range": f"bytes */{content.size}"})
    shown = {"Content-Range": f"bytes {start}-{stop - 1}/{content.size}"}
    return Answer(206, {**headers, **shown}, list(content.cut(start, stop)))


def received(stream: io.BufferedIOBase, length: int, kind: str) -> memoryview:
    """Read a body of `length` bytes, or as much of it as comes before the connection breaks."""
    # Memory fresh from the kernel needs no clearing, but in a bytearray a boundary is found far sooner.
    fresh = length >= _LARGE and not kind.startswith("multipart/")
    body = memoryview(mmap.mmap(-1, length) if fresh else bytearray(length))
    count = 0
    while count < length:
        try:
            more = stream.readinto1(body[count:])
        except ConnectionError:
            break
        if not more:
            break
        count += more
    return body[:count]


def chunk(request: Request) -> Chunk:
    """Return what a `Content-Range` says, or without one that the body is the whole object."""
    text = request.headers.get("Content-Range")
    if text is None:
        return Chunk(0, request.length, request.length)
    found = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", text)
    if found is None:
        raise invalid(f"Invalid Content-Range: {text}")
    start, stop = (int(found[1]), int(found[2]) + 1) if found[1] else (None, 0)
    if stop - (start or 0) != request.length:
        raise invalid(f"Content-Range: {text} does not fit a body of {request.length} bytes")
    return Chunk(start, stop, None if found[3] == "*" else int(found[3]))


def announced(headers: Message) -> int | None:
    """Return how large a session's object will be, if its start says so."""
    size = headers.get("X-Upload-Content-Length")
    if size is not None and not size.isdecimal():
        raise invalid(f"Invalid X-Upload-Content-Length: {size}")
    return None if size is None else int(size)


def sums(headers: Message, resource: Json) -> Sums:
    """Return all checksums that a request gives."""
    given = [pair.strip().partition("=") for pair in ",".join(headers.get_all("x-goog-hash", [])).split(",")]
    pairs = [(kind, value) for kind, _, value in given if kind]
    pairs += [
        (kind, str(resource[name]))
        for name, kind in (("crc32c", "crc32c"), ("md5Hash", "md5"))
        if name in resource
    ]
    for kind, value in pairs:
        try:
            size = len(base64.b64decode(value, validate=True))
        except binascii.Error:
            size = 0
        if size != {"crc32c": 4, "md5": 16}.get(kind):
            raise invalid(f"Invalid checksum: {kind}={value}")
    return pairs


def related(request: Request) -> tuple[Json, memoryview, str]:
    """Return the resource, the bytes and their type of a `multipart/related` body.

    The lines end as the first one does, with CRLF or with LF alone.
    """
    boundary = _boundary(request, "multipart/related")
    whole = request.body.obj
    if not isinstance(whole, bytearray):
        raise invalid("An empty multipart body")
    first = whole.find(b"\n")
    line = b"\r\n" if whole.startswith(b"\r", max(first - 1, 0)) else b"\n"
    if bytes(whole[: first + 1]).lstrip(b"\r\n").rstrip(b" \t\r\n") != b"--" + boundary:
        # A blank line in front is allowed.
        if whole[: first + 1].strip() or not whole.startswith(b"--" + boundary, first + 1):
            raise invalid("The body does not start with its boundary")
        first = whole.find(b"\n", first + 1)
    delimiter = line + b"--" + boundary
    middle = whole.find(delimiter, first)
    second = whole.find(b"\n", middle + len(delimiter))
    end = whole.find(delimiter, second)
    between, after = whole[middle + len(delimiter) : second], whole[end + len(delimiter) :]
    if min(middle, second, end) < 0 or between.strip() or bytes(after).rstrip() != b"--":
        raise invalid("Not two parts and the closing boundary")
    head, at = _part(whole, first + 1, middle, line)
    if head.get_content_type() != "application/json":
        raise invalid(f"The first part is {head.get_content_type()}, not JSON")
    resource = parsed_json(request.body[at:middle])
    head, at = _part(whole, second + 1, end, line)
    return resource, request.body[at:end], head.get("Content-Type", "")


def calls(request: Request) -> Sequence[tuple[str, Request]]:
    """Return the requests of a batch, each with its ID."""
    _boundary(request, "multipart/mixed")
    start = f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode()
    whole = email.parser.BytesParser().parsebytes(start + bytes(request.body))
    parts = whole.get_payload()
    if not isinstance(parts, list) or not parts or whole.defects:
        raise invalid("Failed to parse batch request")
    if len(parts) > _MOST_CALLS:
        raise invalid(f"The batch request has {len(parts)} calls; {_MOST_CALLS} are the most")
    return [_call(part, request.headers) for part in parts if isinstance(part, Message)]


def batched(answers: Sequence[tuple[str, Answer]]) -> Answer:
    boundary = f"batch_{uuid.uuid4().hex}"
    pages = []
    for identity, answer in answers:
        shown = f"<response-{identity[1:]}" if identity.startswith("<") else f"response-{identity}"
        head = f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: {shown}\r\n\r\n"
        pages.append(b"".join([head.encode(), answer.head, *answer.body, b"\r\n"]))
    page = memoryview(b"".join([*pages, f"--{boundary}--\r\n".encode()]))
    return Answer(200, {"Content-Type": f"multipart/mixed; boundary={boundary}"}, [page])


def parsed_json(text: memoryview) -> Json:
    """Return a JSON object; no text at all is an empty one."""
    try:
        value: object = json.loads(bytes(text) or b"{}")
    except ValueError:
        raise Refusal(400, "parseError", "Parse Error") from None
    if not isinstance(value, dict):
        raise Refusal(400, "parseError", "Not an object")
    return value


def _call(part: Message, outer: Message) -> tuple[str, Request]:
    payload = part.get_payload(decode=True)
    if part.get_content_type() != "application/http" or not isinstance(payload, bytes):
        raise invalid("A part of the batch is not application/http")
    first, _, rest = payload.lstrip(b"\r\n").partition(b"\n")
    words = first.decode("latin-1").split()
    if len(words) not in (2, 3) or words[0] not in _CALLS or not words[1].startswith("/storage/v1/"):
        raise invalid(f"Not a call that a batch can hold: {first!r}")
    headers = email.parser.BytesParser().parsebytes(rest)
    if "Authorization" in outer and "Authorization" not in headers:
        headers["Authorization"] = outer["Authorization"]
    return part.get("Content-ID", ""), Request(words[0], words[1], headers, memoryview(b""), 0)


def _boundary(request: Request, kind: str) -> bytes:
    boundary = request.headers.get_param("boundary")
    if request.headers.get_content_type() != kind or not isinstance(boundary, str) or not boundary:
        raise invalid(f"Not {kind} with a boundary: {request.headers.get('Content-Type')}")
    return boundary.encode("latin-1")


def _part(whole: bytearray, start: int, stop: int, line: bytes) -> tuple[Message, int]:
    """Return the headers of a part, and where its body begins."""
    end = whole.find(line + line, start, stop)
    if end < 0:
        raise invalid("A part without a blank line after its headers")
    return email.parser.BytesParser().parsebytes(bytes(whole[start:end])), end + 2 * len(line)
