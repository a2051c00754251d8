"""The wire floor: what it costs to move a state's bytes over HTTP to the same server, and nothing else.

Eight bare sockets. Each puts one object, straight from the tensors'
memory, or gets it straight into theirs. Nothing is signed, checked, named or remembered.
"""

from __future__ import annotations

import itertools
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from bench.endpoint_http import taken
from bench.states import State, tensors_of

_CONNECTIONS = 8
_AT_ONCE = 512
"""Views in one call: the kernel takes 1024."""
_HEAD = 16 << 10
_WOKEN_FOR = 512 << 10
"""Bytes for which the kernel wakes a reader, but for the last of an answer: the cheapest way known."""


class WireError(Exception):
    """The server answered something else than success."""


class Wire:
    """Moves the bytes of the state that it was last shown.

    Args:
        endpoint: URL of a server that takes requests that nobody signed.
        bucket: where the objects go.
    """

    def __init__(self, endpoint: str, bucket: str) -> None:
        parts = urlsplit(endpoint)
        if parts.hostname is None or parts.port is None:
            raise ValueError(f"{endpoint} has no host and port")
        self._address = (parts.hostname, parts.port)
        self._bucket = bucket
        self._shares: list[list[memoryview]] = []

    def prepare(self, state: State) -> None:
        """Look at the tensors' memory, and share it out evenly, in order."""
        views = [tensor.reshape(-1).numpy().data.cast("B") for tensor in tensors_of(state)]
        share = -(-sum(view.nbytes for view in views) // _CONNECTIONS)
        ends = itertools.accumulate(view.nbytes for view in views)
        self._shares = [[] for _ in range(_CONNECTIONS)]
        for view, end in zip(views, ends, strict=True):
            self._shares[(end - 1) // share].append(view)

    def save(self, _: State, name: str) -> None:
        self._each(lambda number, share: self._put(f"{name}/{number}", share))

    def load(self, _: State, name: str) -> None:
        self._each(lambda number, share: self._get(f"{name}/{number}", share))

    def _each(self, task: Callable[[int, list[memoryview]], None]) -> None:
        with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="wire") as pool:
            list(pool.map(task, range(_CONNECTIONS), self._shares))

    def _put(self, key: str, share: Sequence[memoryview]) -> None:
        with socket.create_connection(self._address) as connection:
            length = sum(view.nbytes for view in share)
            connection.sendall(self._head("PUT", key, f"Content-Length: {length}\r\n"))
            _move(share, connection.sendmsg)
            _answer_of(connection)

    def _get(self, key: str, share: Sequence[memoryview]) -> None:
        with socket.create_connection(self._address) as connection:
            connection.sendall(self._head("GET", key, ""))
            _answer_of(connection)
            last = deque(share)
            early = taken(last, max(0, sum(view.nbytes for view in share) - _WOKEN_FOR))
            for part, woken_for in ((early, _WOKEN_FOR), (last, 1)):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, woken_for)
                _move(part, lambda views: connection.recvmsg_into(views, 0, socket.MSG_WAITALL)[0])

    def _head(self, method: str, key: str, more: str) -> bytes:
        host, port = self._address
        unsigned = "x-amz-content-sha256: UNSIGNED-PAYLOAD\r\n"
        return (
            f"{method} /{self._bucket}/{key} HTTP/1.1\r\nHost: {host}:{port}\r\n{unsigned}{more}\r\n".encode()
        )


def _move(share: Iterable[memoryview], some: Callable[[Sequence[memoryview]], int]) -> None:
    """Go on until all views went through, however few bytes one call moves."""
    left = deque(share)
    while left:
        moved = some(list(itertools.islice(left, _AT_ONCE)))
        if not moved:
            raise WireError("the server hung up")
        taken(left, moved)


def _answer_of(connection: socket.socket) -> None:
    """Read the head of an answer, and not a byte of what follows it."""
    while b"\r\n\r\n" not in (head := connection.recv(_HEAD, socket.MSG_PEEK)):
        if not head or len(head) == _HEAD:
            raise WireError("no answer that ends")
    head = connection.recv(head.index(b"\r\n\r\n") + 4, socket.MSG_WAITALL)
    if head.split(b" ", 2)[1] not in {b"200", b"201", b"204"}:
        raise WireError(head.partition(b"\r\n")[0].decode(errors="replace"))
