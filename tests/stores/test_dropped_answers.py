"""An answer that is dropped unread gives its socket back, also where an error's cycle holds it."""

from __future__ import annotations

import gc
import sys
from http.server import BaseHTTPRequestHandler

import pytest
import urllib3

from cloudckpt.backends.stores.http.connections import POOLS
from support.answers import serving


class _Closing(BaseHTTPRequestHandler):
    """Answers 100 bytes, and ends the connection."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(bytes(100))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        """Stay silent."""


def test_an_unread_answer_in_a_cycle_closes_its_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    with serving(_Closing) as url, urllib3.PoolManager() as manager:
        manager.pool_classes_by_scheme = POOLS
        gc.collect()
        seen.clear()
        response = manager.request("GET", url, preload_content=False)
        cycle: list[object] = [response]
        cycle.append(cycle)
        del response, cycle
        gc.collect()
    assert seen == []
