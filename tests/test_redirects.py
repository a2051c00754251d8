"""A server that redirects a request to another host: the request, and what proves who sent it, stay here."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import cloudckpt
from cloudckpt.backends.errors import CheckpointError, ConfigurationError, StorageError

STATUSES = (301, 302, 307, 308)
SCHEMES = ("s3", "gs")


@contextmanager
def answering(
    answer: Callable[[http.server.BaseHTTPRequestHandler], None],
) -> Iterator[tuple[str, list[str]]]:
    """Run a server on loopback; yield its URL, and the requests that it gets with their headers."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            requests.append(f"{self.command} {self.path}\n{self.headers}")
            answer(self)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Print nothing."""

    for verb in ("GET", "PUT", "POST", "HEAD", "DELETE"):
        setattr(Handler, f"do_{verb}", Handler._any)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, name="redirecting", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def options_of(scheme: str, endpoint: str) -> dict[str, Any]:
    common: dict[str, Any] = {"endpoint_url": endpoint, "retries": 1, "timeout": 5.0}
    if scheme == "gs":
        return {**common, "storage_options": {"token": "anon"}}
    keys = {"key": "AKIDEXAMPLE", "secret": "secret", "token": "session-token"}
    return {**common, "region": "us-east-1", "storage_options": keys}


def raised(call: Callable[[], object]) -> CheckpointError:
    with pytest.raises((CheckpointError, CheckpointException)) as caught:
        call()
    error: Any = caught.value
    while isinstance(error, CheckpointException):
        error, _ = error.failures[0]
    assert isinstance(error, CheckpointError)
    return error


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_request_follows_a_redirect_to_another_host(scheme: str, status: int) -> None:
    with ExitStack() as stack:
        other, heard = stack.enter_context(answering(lambda handler: send(handler, 200, {})))
        here, asked = stack.enter_context(
            answering(lambda handler: send(handler, status, {"Location": f"{other}{handler.path}"}))
        )
        options = options_of(scheme, here)
        uri = f"{scheme}://bucket/run"
        for call in (
            lambda: cloudckpt.verify(uri, **options),
            lambda: cloudckpt.collect_garbage(uri, **options),
            lambda: cloudckpt.delete_checkpoint(uri, **options),
            lambda: dcp.save(
                {"w": torch.ones(4)}, storage_writer=cloudckpt.StorageWriter(uri, **options), no_dist=True
            ),
        ):
            error = raised(call)
            assert isinstance(error, StorageError | ConfigurationError), repr(error)
            assert uri in str(error)
    assert asked
    assert heard == []


def send(handler: http.server.BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", "0")
    handler.end_headers()
