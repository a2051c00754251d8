"""Addresses of this host: by interface, by route, and as ``/etc/hosts`` names them.

Nothing here asks what the host's own name resolves to. On Debian and Ubuntu that is 127.0.1.1, in containers
it may be nothing, or the address of a bridge that other hosts have as well.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

Family = socket.AddressFamily

IP_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
FAMILY_NAMES: Final = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}
_HOSTS: Final = Path("/etc/hosts")
_DISCARD: Final = 9
"""A port for UDP sockets that are connected, to learn the route, and never sent through."""


@dataclass(frozen=True, slots=True)
class Route:
    """The addresses at both ends of a connection: this host's and the server's."""

    local: str
    remote: str

    @property
    def ends_here(self) -> bool:
        """True if the server runs on this host."""
        return is_loopback(self.local) or self.local == self.remote


def family_of(address: str) -> Family:
    """Return the family of an IP address.

    Raises:
        ValueError: `address` is not an IP address.
    """
    version = ipaddress.ip_address(address).version
    return socket.AF_INET if version == 4 else socket.AF_INET6  # noqa: PLR2004 - the protocol's own number


def is_address(text: str) -> bool:
    """Return True if `text` is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Return True if `address` reaches no other host: 127.0.0.0/8, ::1, or an address of no host."""
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback or parsed.is_unspecified


def is_unicast(address: str) -> bool:
    """Return True if `address` names one host. Sockets listen on others too, as on a broadcast address."""
    parsed = ipaddress.ip_address(address)
    if parsed.is_unspecified or parsed.is_multicast:
        return False
    return source_for(address) is not None  # a socket connects to a broadcast address only if it asks to


def interfaces() -> dict[str, list[str]]:
    """Return the IP addresses of each interface of this host."""
    found: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        addresses = [entry.address for entry in entries if entry.family in IP_FAMILIES]
        # A link-local address means something only with its interface, and other hosts name theirs otherwise.
        usable = [one for one in addresses if not ipaddress.ip_address(one).is_link_local] or addresses
        if usable:
            found[name] = usable
    return found


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has `address`; None if no interface has it."""
    return next((name for name, addresses in interfaces().items() if address in addresses), None)


def belongs_here(address: str) -> bool:
    """Return True if a socket of this host can listen on `address`."""
    with contextlib.suppress(OSError, ValueError), socket.socket(family_of(address)) as probe:
        probe.bind((address, 0))
        return True
    return False


def route_to(host: str, port: int, timeout: float) -> Route:
    """Connect to a server, and return the addresses at both ends of the connection.

    Raises:
        OSError: no address of `host` accepts a connection within `timeout` seconds.
    """
    with contextlib.closing(socket.create_connection((host, port), timeout=timeout)) as connection:
        return Route(_unmapped(connection.getsockname()[0]), _unmapped(connection.getpeername()[0]))


def source_for(address: str) -> str | None:
    """Return the address of this host from which its routing table sends to `address`, without sending."""
    with (
        contextlib.suppress(OSError, ValueError),
        socket.socket(family_of(address), socket.SOCK_DGRAM) as probe,
    ):
        probe.connect((address, _DISCARD))
        return str(probe.getsockname()[0])
    return None


def addresses_of(host: str) -> list[str]:
    """Return the IP addresses that `host` resolves to on this host; none if it does not resolve."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found if entry[0] in IP_FAMILIES))


def hosts_lines(address: str, hosts: Path = _HOSTS) -> list[str]:
    """Return the lines of ``/etc/hosts`` that name `address`."""
    try:
        lines = hosts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    stripped = (line.partition("#")[0].split() for line in lines)
    return [" ".join(words) for words in stripped if words and words[0] == address]


def network_namespace() -> str:
    """Return a name that processes share if they share a loopback interface: boot and network namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/net').readlink()}"
    except OSError:
        return socket.gethostname()


def _unmapped(address: str) -> str:
    """Return the IPv4 address inside an IPv4-mapped IPv6 address, and any other address as it is."""
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return address if mapped is None else str(mapped)
