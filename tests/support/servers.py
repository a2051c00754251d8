"""Real S3 servers on loopback, each a subprocess with a port of its own.

    with moto_server() as server:
        bucket = server.new_bucket()

A server is found ready by asking it, and is gone when its context ends or its starter dies: it runs in a
process group of its own, which is killed as a whole, and the kernel kills it with the thread that started it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from support.ceph import ceph_server
from support.juicefs import juicefs_server
from support.processes import (
    HOST,
    NotInstalledError,
    ServerStartError,
    again_if_ended_early,
    daemons,
    environment_command,
    script,
    unused_port,
)
from support.s3_server import S3Server
from support.swift import swift_server

__all__ = ["HOST", "NotInstalledError", "S3Server", "ServerStartError", "unused_port"]


def moto_server() -> AbstractContextManager[S3Server]:
    """Run moto's server."""

    def command(port: int) -> list[str]:
        return [script("moto_server"), "-H", HOST, "-p", str(port)]

    return served_by("moto", command)


def ministack_server() -> AbstractContextManager[S3Server]:
    """Run MiniStack with its S3 service alone."""

    def command(port: int) -> list[str]:
        settings = {"BIND_HOST": HOST, "MINISTACK_HOST": HOST, "GATEWAY_PORT": str(port), "SERVICES": "s3"}
        return environment_command(settings, script("ministack"))

    return served_by("ministack", command)


def rclone_server(folder: Path | None = None) -> AbstractContextManager[S3Server]:
    """Run ``rclone serve s3`` over memory or a folder. It alone of the three refuses wrong credentials."""

    def command(port: int) -> list[str]:
        options = ["--config", os.devnull, "--auth-key", "test,testtest", "--addr", f"{HOST}:{port}"]
        return [script("rclone"), "serve", "s3", *options, str(folder or ":memory:")]

    return served_by("rclone", command)


SERVERS: dict[str, Callable[[], AbstractContextManager[S3Server]]] = {
    "moto": moto_server,
    "ministack": ministack_server,
    "rclone": rclone_server,
    "juicefs": juicefs_server,
}
"""Servers that the test requirements bring."""

MORE_SERVERS: dict[str, Callable[[], AbstractContextManager[S3Server]]] = {
    "ceph": ceph_server,
    "swift": swift_server,
}
"""Servers for long forms of tests. Where one is not installed, its context raises NotInstalledError."""


@contextlib.contextmanager
def served_by(name: str, command: Callable[[int], list[str]]) -> Iterator[S3Server]:
    """Run the server that ``command`` starts on the port given to it."""
    with again_if_ended_early(lambda: _started(name, command)) as server:
        yield server


@contextlib.contextmanager
def _started(name: str, command: Callable[[int], list[str]]) -> Iterator[S3Server]:
    with daemons(name) as family:
        port = unused_port()
        process = family.start(*command(port))
        family.wait(process, port)
        yield S3Server(name, f"http://{HOST}:{port}", "test", "testtest", process.pid)
