"""An S3 server for benchmarks, in memory, that costs less CPU than its clients.

    with served() as endpoint:
        save(endpoint.server)
        print(endpoint.counts())

It runs as a process of its own, `bench.endpoint_server`, and counts what it is asked for.
"""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from support.servers import HOST, S3Server, served_by

_TESTS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Counts:
    """What a server did since its start or the last reset."""

    requests: dict[str, int]
    """By operation: "UploadPart", "GetObject", ...; refused ones too."""
    received: int
    """Bytes of bodies, without the framing of chunks."""
    sent: int
    """Bytes of bodies."""
    cpu_seconds: float
    """Of the server's process."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A running server."""

    server: S3Server

    def counts(self) -> Counts:
        return Counts(**self._ask("counts"))

    def reset(self) -> None:
        """Zero the counts; the objects stay."""
        self._ask("reset")

    def listen(self, namespace: str, address: str, port: int) -> None:
        """Listen in a network namespace as well."""
        self._ask(f"listen/{namespace}/{address}/{port}")

    def _ask(self, what: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection(urlsplit(self.server.endpoint).netloc, timeout=60)
        with closing(connection):
            connection.request("GET", f"/_endpoint/{what}")
            found: dict[str, Any] = json.loads(connection.getresponse().read())
        return found


@contextmanager
def served(*, discard: bool = False) -> Iterator[Endpoint]:
    """Run a server; with ``discard`` it keeps of bodies above 64 KiB only their size, and sends zeros."""

    def command(port: int) -> list[str]:
        options = ["--host", HOST, "--port", str(port), *(["--discard"] if discard else [])]
        return ["env", f"PYTHONPATH={_TESTS}", sys.executable, "-m", "bench.endpoint_server", *options]

    with served_by("endpoint", command) as server:
        yield Endpoint(server)
