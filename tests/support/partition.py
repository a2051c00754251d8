"""A network between two hosts and an S3 server of a job, and the cuts that a test makes in it.

All three are on one bridge. A cut either isolates a port of the bridge or keeps two ports from each other;
no end is told, so packets are lost silently.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.hosts import inside
from support.processes import HOST, daemons, script
from support.s3_server import S3Server
from support.sites import Host, found, site

SERVER_PORT = 9000

Cut = tuple[int, ...]
"""Numbers of the hosts that a cut is about: one is cut off from all others, two from each other."""


@dataclass(frozen=True, slots=True)
class Network:
    """The network: the job's hosts, and the S3 server on a host of its own."""

    hosts: list[Host]
    server: S3Server
    _bridge: subprocess.Popen[str]

    def cut(self, cut: Cut) -> None:
        """Lose all packets of a host, or between two hosts, from now on."""
        self._set(cut, on=True)

    def heal(self, cut: Cut) -> None:
        """Undo a cut."""
        self._set(cut, on=False)

    def _set(self, cut: Cut, *, on: bool) -> None:
        for number in cut:
            # A disabled port forwards nothing. An isolated one reaches all but other isolated ones.
            change = f"isolated {'on' if on else 'off'}" if len(cut) > 1 else f"state {0 if on else 3}"
            self._say(f"link set dev eth0-{number} {change}")

    def _say(self, line: str) -> None:
        assert self._bridge.stdin is not None
        self._bridge.stdin.write(f"{line}\n")
        self._bridge.stdin.flush()


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """Make the hosts and start the server.

    Raises:
        PermissionError: this process may not make namespaces, or a program of iproute2 is missing.
    """
    with contextlib.ExitStack() as stack:
        *hosts, at_server = stack.enter_context(site(folder, count=3))
        family = stack.enter_context(daemons("moto"))
        command = [script("moto_server"), "-H", "0.0.0.0", "-p", str(SERVER_PORT)]  # noqa: S104 - in a namespace
        server_process = family.start(*at_server.command(*command))
        family.wait_until(lambda: _listens(at_server))
        server = S3Server(
            "moto", f"http://{at_server.ipv4}:{SERVER_PORT}", "test", "testtest", server_process.pid
        )
        bridge = stack.enter_context(
            subprocess.Popen(
                [found("ip"), "netns", "exec", at_server.bridges, found("bridge"), "-force", "-batch", "-"],
                stdin=subprocess.PIPE,
                text=True,
            )
        )
        yield Network(hosts, server, bridge)
        bridge.kill()


def _listens(host: Host) -> bool:
    with inside(host.namespace), contextlib.suppress(ConnectionRefusedError):
        socket.create_connection((HOST, SERVER_PORT)).close()
        return True
    return False
