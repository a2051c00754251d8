"""The process of `bench.endpoint`: an S3 server in memory that costs less than its clients.

Run as `python -m bench.endpoint_server --port N`, it needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import itertools
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from bench.endpoint_http import Answer, Reader, Request, parse, send
from bench.endpoint_s3 import S3
from bench.endpoint_store import Pool
from support.hosts import inside

_ADMIN = "_endpoint"
"""No bucket can have this name."""


class Meter:
    """Counts of what was asked for, and of the process' CPU time, since the start or the last reset."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._received = self._sent = 0
        self._cpu_start = time.process_time()

    def count(self, operation: str, received: int, sent: int) -> None:
        with self._lock:
            self._requests[operation] += 1
            self._received += received
            self._sent += sent

    def unsent(self, count: int) -> None:
        """Take back what a client didn't take."""
        with self._lock:
            self._sent -= count

    def reset(self) -> None:
        with self._lock:
            self._requests.clear()
            self._received = self._sent = 0
            self._cpu_start = time.process_time()

    def counts(self) -> Mapping[str, object]:
        with self._lock:
            return {
                "requests": dict(self._requests),
                "received": self._received,
                "sent": self._sent,
                "cpu_seconds": time.process_time() - self._cpu_start,
            }


class Server:
    """Connections, each served by a thread of its own."""

    def __init__(self, pool: Pool) -> None:
        self._s3 = S3(pool)
        self._meter = Meter()
        self._numbers = itertools.count(1)

    def serve(self, listening: socket.socket) -> None:
        """Serve until the process is killed."""
        for number in itertools.count(1):
            connection, _ = listening.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            name = f"connection {number}"
            threading.Thread(target=self._converse, args=[connection], name=name, daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        reader = Reader(connection)
        with connection:
            try:
                while self._exchange(connection, reader):
                    pass
            except ConnectionError as gone:
                print(gone, file=sys.stderr)  # noqa: T201 - the log of the server

    def _exchange(self, connection: socket.socket, reader: Reader) -> bool:
        """Serve one request and forget it: a thread that waits for the next holds no memory of objects."""
        head = reader.head()
        if head is None:
            return False
        sent = 0
        request = parse(head, reader, lambda: connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n"))
        if request.bucket == _ADMIN:
            answer = self._administer(request)
        else:
            operation, answer = self._s3.answer(request)
            # Counted before it is sent: whoever has the answer finds it counted.
            sent = 0 if request.method == "HEAD" else answer.size
            self._meter.count(operation, request.body.size, sent)
        number = next(self._numbers)
        unsent = send(connection, answer, head_only=request.method == "HEAD", number=number)
        if unsent:
            self._meter.unsent(min(unsent, sent))
        return not unsent and request.headers.get("connection", "").lower() != "close"

    def _administer(self, request: Request) -> Answer:
        request.body.finish()
        what, _, rest = request.key.partition("/")
        if what == "reset":
            self._meter.reset()
        elif what == "listen":
            namespace, address, port = rest.split("/")
            with inside(namespace):
                listening = socket.create_server((address, int(port)), backlog=1024)
            threading.Thread(
                target=self.serve, args=[listening], name=f"listen in {namespace}", daemon=True
            ).start()
        page = json.dumps(self._meter.counts()).encode()
        return Answer(200, {"Content-Type": "application/json"}, len(page), [memoryview(page)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Listen and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--idle-mib", type=int, default=5120, help="memory to keep for bodies to come")
    parser.add_argument("--discard", action="store_true", help="keep only the sizes of large bodies")
    options = parser.parse_args(arguments)
    pool = Pool(options.idle_mib << 20, discard=options.discard)
    with socket.create_server((options.host, options.port), backlog=1024) as listening:
        Server(pool).serve(listening)


if __name__ == "__main__":
    main()
