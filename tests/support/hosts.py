"""Two hosts on one machine: network namespaces with a cable between them that a test can pull."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, slots=True)
class Host:
    """A host of a test's own; ``prefix`` before a command line runs it there."""

    namespace: str
    address: str
    interface: str

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace)

    def link(self, state: str) -> None:
        """Set this end of the cable ``up`` or ``down``."""
        _ip("-n", self.namespace, "link", "set", self.interface, state)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nobody else.

    Raises:
        PermissionError: this process may not make network namespaces, or there is no ``ip`` program.
    """
    name = uuid.uuid4().hex[:6]
    hosts = tuple(Host(f"ckpt-{name}-{n}", f"10.213.77.{n + 1}", f"veth-{name}-{n}") for n in range(2))
    with contextlib.ExitStack() as stack:
        for host in hosts:
            try:
                _ip("netns", "add", host.namespace)
            except (subprocess.CalledProcessError, FileNotFoundError) as error:
                raise PermissionError(f"no network namespaces here: {error}") from error
            stack.callback(_ip, "netns", "delete", host.namespace)
        first, second = hosts
        _ip(
            "link", "add", first.interface, "netns", first.namespace,
            "type", "veth", "peer", second.interface, "netns", second.namespace,
        )  # fmt: skip
        for host in hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            host.link("up")
        yield first, second


def _ip(*arguments: str) -> None:
    program = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "ip"
    subprocess.run([program, *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Have this thread be in a network namespace of ``ip netns``: its sockets, and the threads that it
    starts."""
    with Path("/proc/thread-self/ns/net").open() as own:
        enter(namespace)
        try:
            yield
        finally:
            _enter(own.fileno())


def enter(namespace: str) -> None:
    """Have this thread be in a network namespace of ``ip netns`` from here on.

    Raises:
        OSError: there is none of that name, or this process may not enter it.
    """
    with Path(f"/run/netns/{namespace}").open() as opened:
        _enter(opened.fileno())


def _enter(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):  # os.setns: Python 3.12
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
