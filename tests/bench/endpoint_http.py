"""HTTP as S3's clients speak it, for the server in `bench.endpoint`: requests in, answers out, no copies."""

from __future__ import annotations

import itertools
import socket
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol
from urllib.parse import parse_qsl, unquote

from bench.endpoint_store import VOID, Block

_HEAD = 32 << 10
"""Bytes that the head of a request may have."""
_VIEWS = 256
"""Buffers handed to one sendmsg; the kernel takes 1024."""


class Source(Protocol):
    """Bytes that arrive in order."""

    def line(self) -> bytes:
        """Return the bytes up to the next CRLF, without it."""
        ...

    def fill(self, count: int, views: deque[memoryview] | None) -> None:
        """Receive so many bytes to the front of the views, which lose what is filled, or to nowhere."""
        ...


class Reader:
    """What a socket brings: heads through a small buffer, bodies straight to where they stay."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._memory = bytearray(_HEAD)
        self._begin = self._end = 0

    def head(self) -> bytes | None:
        """Return the next request's head; None where the client has closed the connection instead."""
        return self._until(b"\r\n\r\n")

    def line(self) -> bytes:
        found = self._until(b"\r\n")
        if found is None:
            raise _cut_off()
        return found

    def fill(self, count: int, views: deque[memoryview] | None) -> None:
        early = min(self._end - self._begin, count)
        if views is None:
            self._begin += early
            self._skip(count - early)
            return
        for view in taken(views, early):
            view[:] = memoryview(self._memory)[self._begin : self._begin + len(view)]
            self._begin += len(view)
        self._receive(deque(taken(views, count - early)))

    def _receive(self, views: deque[memoryview]) -> None:
        # One call for as much as it takes: the thread sleeps until all of that is there.
        while views:
            several = list(itertools.islice(views, _VIEWS))
            came = self._socket.recvmsg_into(several, 0, socket.MSG_WAITALL)[0]
            if not came:
                raise _cut_off()
            taken(views, came)

    def _skip(self, count: int) -> None:
        # Truncated, it isn't even copied.
        while count:
            came = self._socket.recv_into(VOID[:count], 0, socket.MSG_WAITALL | socket.MSG_TRUNC)
            if not came:
                raise _cut_off()
            count -= came

    def _until(self, mark: bytes) -> bytes | None:
        while True:
            found = self._memory.find(mark, self._begin, self._end)
            if found >= 0:
                text = bytes(memoryview(self._memory)[self._begin : found])
                self._begin = found + len(mark)
                return text
            waiting = self._end - self._begin
            if waiting == _HEAD:
                raise ConnectionError("the head of a request is too long")
            self._memory[:waiting] = self._memory[self._begin : self._end]
            self._begin, self._end = 0, waiting
            came = self._socket.recv_into(memoryview(self._memory)[waiting:])
            if not came:
                if waiting:
                    raise ConnectionError("the connection ended within a head")
                return None
            self._end += came


class Chunks:
    """The bytes in either kind of chunks: HTTP's, or S3's, whose sizes may be followed by a signature."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = 0

    def line(self) -> bytes:
        text, one = bytearray(), memoryview(bytearray(1))
        while not text.endswith(b"\r\n"):
            self.fill(1, deque([one]))
            text += one
        return bytes(text[:-2])

    def fill(self, count: int, views: deque[memoryview] | None) -> None:
        while count:
            if not self._left:
                self._left = self._next_size()
                if not self._left:
                    raise ConnectionError("the chunks hold less than was announced")
            now = min(self._left, count)
            self._source.fill(now, views)
            count -= now
            self._left -= now
            if not self._left:
                self._source.line()

    def finish(self) -> None:
        """Read the last chunk, which is empty, and the trailers."""
        if self._left or self._next_size():
            raise ConnectionError("the chunks hold more than was announced")
        while self._source.line():
            pass

    def _next_size(self) -> int:
        return int(self._source.line().partition(b";")[0], 16)


class Body:
    """The body of a request, without its framing."""

    def __init__(self, headers: Mapping[str, str], reader: Reader, invite: Callable[[], object]) -> None:
        expected = "100-continue" in headers.get("expect", "").lower()
        self._invite = invite if expected else None
        self._source: Source = reader
        self._chunks: list[Chunks] = []
        length = headers.get("content-length", "0")
        if "chunked" in headers.get("transfer-encoding", ""):
            self._unwrap()
            length = headers.get("x-amz-decoded-content-length", "")
        streamed = headers.get("x-amz-content-sha256", "").startswith("STREAMING-")
        if streamed or "aws-chunked" in headers.get("content-encoding", ""):
            self._unwrap()
            length = headers.get("x-amz-decoded-content-length", "")
        if not length:
            raise ConnectionError("a body without its length is refused")
        self.size = self._left = int(length)

    def _unwrap(self) -> None:
        self._chunks.append(Chunks(self._source))
        self._source = self._chunks[-1]

    def receive(self, block: Block) -> None:
        """Receive all of it into a block of its size."""
        self._fill(None if block.discards else deque(block.views(0, block.size)))

    def read(self) -> bytes:
        """Return all of it."""
        memory = bytearray(self.size)
        self._fill(deque([memoryview(memory)]))
        return bytes(memory)

    def finish(self) -> None:
        """Read what is left of it, so that the next request comes next."""
        if self._left or self._chunks:
            self._fill(None)
        for chunks in reversed(self._chunks):
            chunks.finish()

    def _fill(self, views: deque[memoryview] | None) -> None:
        """Receive what is left of it to the views, or to nowhere."""
        if self._invite is not None:
            self._invite()
            self._invite = None
        self._source.fill(self._left, views)
        self._left = 0


@dataclass(frozen=True, slots=True)
class Request:
    """A request, addressed in path style."""

    method: str
    bucket: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """By names in lower case."""
    body: Body


@dataclass(frozen=True, slots=True)
class Answer:
    """What is answered."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    size: int = 0
    """Bytes of the body."""
    body: Iterable[memoryview] = ()
    holds: object = None
    """What must live while the body is sent, for its memory not to be used again."""

    @classmethod
    def xml(cls, text: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
        """Return an answer with a document."""
        page = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()
        return cls(
            status, {"Content-Type": "application/xml", **(headers or {})}, len(page), [memoryview(page)]
        )


def parse(head: bytes, reader: Reader, invite: Callable[[], object]) -> Request:
    """Take a head apart; ``invite`` asks the client for a body that it holds back."""
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    path, _, query = target.partition("?")
    bucket, _, key = path.removeprefix("/").partition("/")
    return Request(
        method,
        unquote(bucket),
        unquote(key),
        dict(parse_qsl(query, keep_blank_values=True)),
        headers,
        Body(headers, reader, invite),
    )


def send(connection: socket.socket, answer: Answer, *, head_only: bool, number: int) -> int:
    """Send an answer and return how many bytes didn't go out; if any, the connection is broken."""
    lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in answer.headers.items()]
    if answer.status not in (204, 304):
        lines.append(f"Content-Length: {answer.size}")
    lines.append(f"x-amz-request-id: {number:016X}\r\n\r\n")
    head = memoryview("\r\n".join(lines).encode("latin-1"))
    waiting = deque([head] if head_only else filter(len, itertools.chain([head], answer.body)))
    while waiting:
        try:
            sent = connection.sendmsg(itertools.islice(waiting, _VIEWS))
        except ConnectionError:
            return sum(map(len, waiting))
        taken(waiting, sent)
    return 0


def taken(views: deque[memoryview], count: int) -> list[memoryview]:
    """Take so many bytes off the front of the views; none of these is empty."""
    taken: list[memoryview] = []
    while count:
        view = views.popleft()
        if len(view) > count:
            views.appendleft(view[count:])
            view = view[:count]
        taken.append(view)
        count -= len(view)
    return taken


def _cut_off() -> ConnectionError:
    return ConnectionError("the connection ended within a body")
