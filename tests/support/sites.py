"""Several hosts on one machine: namespaces on a bridge, each with a name and an ``/etc/hosts`` of its own.

The hosts share the machine's files. Firewalls are routing rules, so that nothing but iproute2 is needed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

LOCALHOST = "127.0.0.1 localhost\n::1 localhost ip6-localhost\n"

_START = """
set -e
mount --bind "$1" /etc/hosts
mount --bind "$2" /etc/nsswitch.conf
hostname "$3"
shift 3
exec "$@"
"""


@dataclass(frozen=True, slots=True)
class Host:
    """A host; `command` makes a command line run on it."""

    number: int
    namespace: str
    name: str
    folder: Path

    @property
    def ipv4(self) -> str:
        return f"10.77.0.1{self.number}"

    @property
    def ipv6(self) -> str:
        return f"fd77::1{self.number}"

    @property
    def bridges(self) -> str:
        """The namespace of the bridges, each of which has a port ``eth0-NUMBER`` for this host."""
        return f"{self.namespace.rpartition('-')[0]}-b"

    @property
    def second(self) -> str:
        """Its address on the second network."""
        return f"10.78.0.1{self.number}"

    def knows(self, *lines: str) -> None:
        """Write its ``/etc/hosts``, below the lines of localhost."""
        (self.folder / "hosts").write_text(LOCALHOST + "".join(f"{line}\n" for line in lines))

    def command(self, *arguments: str) -> list[str]:
        return [
            *("ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts", "sh", "-c", _START, "sh"),
            *(str(self.folder / "hosts"), str(self.folder / "nsswitch.conf"), self.name, *arguments),
        ]

    def ip(self, *arguments: str) -> None:
        run("ip", "-n", self.namespace, *arguments)

    def close_ports(self, how: Literal["blackhole", "prohibit"], *but: str) -> None:
        """Let in no TCP but to and from these ports: silently, or with an ICMP answer that says so."""
        for family in ("-4", "-6"):
            for number, port in enumerate(but):
                for side in ("dport", "sport"):
                    self._rule(
                        family, 10 + number, "iif", "eth0", "ipproto", "tcp", side, port, "lookup", "local"
                    )
            self._rule(family, 50, "iif", "eth0", "ipproto", "tcp", "dport", "1-65534", how)
            self._rule(family, 100, "lookup", "local")
            self.ip(family, "rule", "del", "pref", "0")  # it would decide before the others

    def close_port_for_new_connections(self, port: int) -> None:
        """Drop what asks for a connection to a port: it needs nft, for a rule can't tell it from others."""
        rules = (
            "add table inet closed; add chain inet closed input { type filter hook input priority 0; }; "
            f"add rule inet closed input iifname eth0 tcp dport {port} tcp flags syn drop"
        )
        run("ip", "netns", "exec", self.namespace, "nft", rules)

    def _rule(self, family: str, preference: int, *rule: str) -> None:
        self.ip(family, "rule", "add", "pref", str(preference), *rule)


@dataclass(slots=True)
class Site:
    """The hosts, and a folder that all of them see."""

    hosts: list[Host] = field(default_factory=list)


@contextlib.contextmanager
def site(folder: Path, count: int = 2, *, ipv4: bool = True, second: bool = False) -> Iterator[list[Host]]:
    """Make hosts that reach each other by IPv6, and by IPv4 unless that is off.

    ``second`` gives each an interface ``eth1`` on a network of its own.

    Raises:
        PermissionError: this process may not make namespaces, or there is no ``ip`` or ``unshare`` program.
    """
    site_name = uuid.uuid4().hex[:6]
    with contextlib.ExitStack() as stack:
        bridges = _namespace(stack, f"ckpt-{site_name}-b")
        hosts: list[Host] = []
        for name in ("br0", "br1") if second else ("br0",):
            run("ip", "-n", bridges, "link", "add", name, "type", "bridge")
            run("ip", "-n", bridges, "link", "set", name, "up")
        for number in range(1, count + 1):
            namespace = _namespace(stack, f"ckpt-{site_name}-{number}")
            host = Host(number, namespace, f"host{'abcdef'[number - 1]}", folder / f"etc-{number}")
            host.folder.mkdir()
            host.knows()
            (host.folder / "nsswitch.conf").write_text("hosts: files\n")
            host.ip("link", "set", "lo", "up")
            _cable(host, bridges, "eth0", "br0")
            if ipv4:
                host.ip("addr", "add", f"{host.ipv4}/24", "dev", "eth0")
            host.ip("addr", "add", f"{host.ipv6}/64", "dev", "eth0", "nodad")
            if second:
                _cable(host, bridges, "eth1", "br1")
                host.ip("addr", "add", f"{host.second}/24", "dev", "eth1")
            hosts.append(host)
        yield hosts


def _namespace(stack: contextlib.ExitStack, name: str) -> str:
    try:
        run("ip", "netns", "add", name)
        stack.callback(run, "ip", "netns", "delete", name)
        run(
            "ip",
            "netns",
            "exec",
            name,
            "unshare",
            "--mount",
            "--uts",
            "mount",
            "--bind",
            "/etc/hosts",
            "/etc/hosts",
        )
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise PermissionError(f"no network, mount and UTS namespaces here: {error}") from error
    return name


def _cable(host: Host, bridges: str, interface: str, bridge: str) -> None:
    end = f"{interface}-{host.number}"
    run(
        *("ip", "-n", bridges, "link", "add", end, "type", "veth"),
        *("peer", "name", interface, "netns", host.namespace),
    )
    run("ip", "-n", bridges, "link", "set", end, "master", bridge, "up")
    host.ip("link", "set", interface, "up")


def run(program: str, *arguments: str) -> None:
    """Run a program of the system's administration.

    Raises:
        subprocess.CalledProcessError: it failed; its notes have what it said.
    """
    try:
        subprocess.run([found(program), *arguments], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        error.add_note(str(error.stderr))
        raise


def found(program: str) -> str:
    """Return the path of a program of the system's administration, or its name where it is not installed."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or program
