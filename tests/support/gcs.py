"""A running GCS server, and a way to its objects that is none of the store's."""

from __future__ import annotations

import atexit
import functools
import http.client
import json
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from support.servers import HOST, served_by

_TESTS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class GCSServer:
    """The server of `support.gcs_server`, running."""

    name: str
    endpoint: str
    """URL without a trailing slash."""
    pid: int

    def new_bucket(self, token: str | None = None, *, xml: bool = True, **settings: Any) -> str:
        """Create an empty bucket with a fresh name and return the name; without the XML API if need be."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        body = json.dumps({"name": name, **settings}).encode()
        self._ask("POST", "/storage/v1/b?project=tests", body, token)
        if not xml:
            self._ask("POST", "/_gcs/json-only", json.dumps({"bucket": name}).encode())
        return name

    def resource(self, bucket: str, name: str) -> dict[str, Any]:
        """What the server tells of an object."""
        where = f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}"
        found: dict[str, Any] = json.loads(self._ask("GET", where))
        return found

    def reset(self) -> None:
        """Forget faults and the requests that were made."""
        self._ask("POST", "/_gcs/faults", b"[]")
        self.imitate()
        self._ask("POST", "/_gcs/reset")

    def read(self, bucket: str, name: str) -> bytes | None:
        """An object's bytes; None where there is none."""
        status, data = self.ask("GET", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}?alt=media")
        return data if status == 200 else None

    def write(self, bucket: str, name: str, data: bytes) -> None:
        """Put an object."""
        where = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(name, safe='')}"
        self._ask("POST", where, data)

    def remove(self, bucket: str, name: str) -> None:
        """Delete an object."""
        status, data = self.ask("DELETE", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}")
        assert status in (200, 204), (status, data)

    def names(self, bucket: str, prefix: str) -> list[str]:
        """Names of the objects that begin with a prefix."""
        found, token = list[str](), ""
        while True:
            query = urlencode({"prefix": prefix, "pageToken": token})
            page = json.loads(self._ask("GET", f"/storage/v1/b/{bucket}/o?{query}"))
            found += [item["name"] for item in page.get("items", ())]
            if not (token := page.get("nextPageToken", "")):
                return found

    def sessions(self) -> list[dict[str, Any]]:
        """Sessions and multipart uploads that are open: bucket, name, bytes held."""
        found: list[dict[str, Any]] = json.loads(self._ask("GET", "/_gcs/sessions"))["open"]
        return found

    def requests(self) -> list[list[str]]:
        """Method and path of each request since the last `reset`."""
        found: list[list[str]] = json.loads(self._ask("GET", "/_gcs/requests"))
        return found

    def spoil(self, *faults: dict[str, Any]) -> None:
        """Let requests fail from here on, as `support.gcs_server` says."""
        self._ask("POST", "/_gcs/faults", json.dumps(faults).encode())

    def imitate(self, **quirks: Any) -> None:
        """Behave as other servers do from here on, as `support.gcs_quirks` says; without any, as Google."""
        self._ask("POST", "/_gcs/quirks", json.dumps(quirks).encode())

    def deny(self, bucket: str, *permissions: str) -> None:
        """Deny these permissions on a bucket from here on, and no others."""
        self._ask("POST", "/_gcs/denials", json.dumps({bucket: permissions}).encode())

    def faults_to_come(self) -> int:
        """How many of the faults that were asked for no request has met."""
        return int(json.loads(self._ask("GET", "/_gcs/faults"))["to_come"])

    def ask(
        self, method: str, where: str, body: bytes | None = None, token: str | None = None
    ) -> tuple[int, bytes]:
        """Make a request; status and body of the answer."""
        connection = http.client.HTTPConnection(urlsplit(self.endpoint).netloc, timeout=60)
        with closing(connection):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            if where.startswith("/storage/"):
                headers["Content-Type"] = "application/json"
            connection.request(method, where, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def _ask(self, method: str, where: str, body: bytes | None = None, token: str | None = None) -> bytes:
        status, data = self.ask(method, where, body, token)
        assert status == 200, (status, data)
        return data


@contextmanager
def gcs_server(*more: str) -> Iterator[GCSServer]:
    """Run a server, with more options if need be."""

    def command(port: int) -> list[str]:
        options = ["--host", HOST, "--port", str(port), *more]
        return ["env", f"PYTHONPATH={_TESTS}", sys.executable, "-m", "support.gcs_server", *options]

    with served_by("gcs", command) as server:
        yield GCSServer("gcs", server.endpoint, server.pid)


@functools.cache
def shared_gcs_server() -> GCSServer:
    """Start a server once in this process; it ends with it."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(gcs_server())
