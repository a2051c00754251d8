"""The network options of a job: ``interface`` and ``port_range``."""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.executor.network import host_addresses
from cloudckpt.executor.network.host_addresses import Family

_INTERFACE, _PORTS, _GLOO = "CLOUDCKPT_INTERFACE", "CLOUDCKPT_PORT_RANGE", "GLOO_SOCKET_IFNAME"
LARGEST_PORT = 65535
_PORT_ERRORS = (errno.EADDRINUSE, errno.EACCES)
"""Errors of one port: another one may be free."""

PortRange = str | tuple[int, int]
"""Ports from the first to the last, as ``"29600-29699"`` or a pair."""


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """The address and ports that the checkpoint processes of this rank use.

    Attributes:
        interface: name of an interface, an IP address of this host, or a network such as ``10.0.0.0/8``.
            None takes the address from which this rank reaches the training's store.
        source: what set `interface`.
        ports: first and last port to listen on; None leaves the choice to the system.
    """

    interface: str | None = None
    source: str = "interface="
    ports: tuple[int, int] | None = None

    @classmethod
    def given(cls, interface: str | None = None, port_range: PortRange | None = None) -> Self:
        """Parse the keywords; where one is None, its environment variable.

        ``CLOUDCKPT_INTERFACE`` comes before ``GLOO_SOCKET_IFNAME``, which may list several interfaces: the
        first serves.

        Raises:
            ConfigurationError: this host has no such interface or address, or the ports are not a range.
        """
        source = "interface="
        if interface is None:
            source = _INTERFACE if os.environ.get(_INTERFACE) else _GLOO
            interface = os.environ.get(source, "").split(",")[0].strip() or None
        elif not isinstance(interface, str) or not interface.strip():
            raise ConfigurationError(f"interface is {interface!r}", hint=_interface_hint())
        options = cls(interface and interface.strip(), source, _ports(port_range))
        if source != _GLOO:  # which is the training's: its own error comes first
            options.addresses()
        return options

    def addresses(self) -> dict[Family, str]:
        """Return the addresses of this host that `interface` stands for, by family; none without one.

        Raises:
            ConfigurationError: this host has no such interface or address.
        """
        if self.interface is None:
            return {}
        found = list(self._matching())
        if not found:
            raise ConfigurationError(
                f"{self.source}{'' if self.source.endswith('=') else '='}{self.interface} names no interface "
                f"or address of host {socket.gethostname()}",
                hint=_interface_hint(),
            )
        by_family: dict[Family, str] = {}
        for address in found:
            by_family.setdefault(host_addresses.family_of(address), address)
        return by_family

    def listen(self, address: str) -> socket.socket:
        """Listen on a port of the range, or one that the system chooses without a range.

        Raises:
            ConfigurationError: every port of the range is taken, or reserved for root.
            OSError: this host can't listen on `address`.
        """
        refused = 0
        for port in self._candidates():
            listener = socket.socket(host_addresses.family_of(address))
            try:
                if self.ports is not None:
                    # Without this, a port is taken for a minute after the process that used it was killed.
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if address == "::":
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                listener.bind((address, port))
                listener.listen(socket.SOMAXCONN)
            except OSError as error:
                listener.close()
                if self.ports is None or error.errno not in _PORT_ERRORS:
                    raise
                refused = error.errno
            else:
                return listener
        first, last = self.ports or (0, 0)
        raise ConfigurationError(
            f"no port of port_range={first}-{last} is free on {address} (host {socket.gethostname()}): "
            f"{os.strerror(refused)}",
            hint="Give a range with more ports, and a range of its own to each job of a host"
            if refused == errno.EADDRINUSE
            else "Give ports from 1024 on, which are open to every user",
        )

    def _matching(self) -> Iterator[str]:
        wanted, here = self.interface or "", host_addresses.interfaces()
        if wanted in here:
            yield from here[wanted]
        elif host_addresses.is_address(wanted):
            if host_addresses.is_unicast(wanted) and host_addresses.belongs_here(wanted):
                yield wanted
        else:
            try:
                network = ipaddress.ip_network(wanted, strict=False)
            except ValueError:
                return
            for address in (one for several in here.values() for one in several):
                if ipaddress.ip_address(address) in network:
                    yield address

    def _candidates(self) -> Iterator[int]:
        if self.ports is None:
            yield 0
            return
        first, last = self.ports
        count = last - first + 1
        start = secrets.randbelow(count)  # jobs that share a range seldom try the same port first
        yield from (first + (start + step) % count for step in range(count))


def _ports(given: PortRange | None) -> tuple[int, int] | None:
    name = "port_range="
    if given is None:
        given, name = os.environ.get(_PORTS) or None, f"{_PORTS}="
        if given is None:
            return None
    try:
        if isinstance(given, str):
            first_text, dash, last_text = given.partition("-")
            first, last = int(first_text), int(last_text if dash else first_text)
        else:
            first, last = given
        if type(first) is type(last) is int and 0 < first <= last <= LARGEST_PORT:
            return first, last
    except (TypeError, ValueError):
        pass
    raise ConfigurationError(
        f"{name}{given!r} is not a range of ports",
        hint=f"Give the first and the last port, from 1 to {LARGEST_PORT}, as '29600-29699'",
    )


def _interface_hint() -> str:
    here = ", ".join(f"{name} ({', '.join(found)})" for name, found in host_addresses.interfaces().items())
    return f"Give an interface, an address, or a network such as 10.0.0.0/8. This host has {here}"
