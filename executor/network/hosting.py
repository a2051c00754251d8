"""A store that rank 0 of a job opens, and the address at which every other rank reaches it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from torch.distributed import TCPStore

from cloudckpt.backends.config.endpoint_url import host_and_port
from cloudckpt.executor.network import host_addresses
from cloudckpt.executor.network.members import said_by_hosts
from cloudckpt.executor.network.network_options import NetworkOptions
from cloudckpt.executor.network.probe import LONGEST, connect_all

_SETTLE: Final = 1.0
"""Seconds for the other addresses after the first has answered."""
_LOOPBACK: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Offer:
    """The addresses of a store, best first, as its host knows them.

    Attributes:
        candidates: names or addresses.
        port: of the store.
        namespace: of the host: an address that another host has as well means another server there.
        server: the store; it stays with the process that opened it.
    """

    candidates: tuple[str, ...]
    port: int
    namespace: str
    server: TCPStore | None = field(default=None, repr=False)

    def __reduce__(self) -> Any:
        return type(self), (self.candidates, self.port, self.namespace)

    @classmethod
    def opened(cls, options: NetworkOptions, first: Iterable[str] = ()) -> Self:
        """Open a store on this host, on a port of the options or one that the system chooses.

        Args:
            options: an interface in them is the only address offered.
            first: names or addresses to prefer.

        Raises:
            ConfigurationError: this host has no such interface, or no port of the range is free.
        """
        chosen = list(options.addresses().values())
        if chosen:
            listener, name = options.listen(chosen[0]), chosen[0]
        else:
            dual = socket.has_dualstack_ipv6()
            listener = options.listen("::" if dual else "0.0.0.0")  # noqa: S104 - as training's
            name = "localhost"
            here = [one for several in host_addresses.interfaces().values() for one in several]
            chosen = [*first, *(one for one in here if not host_addresses.is_loopback(one)), _LOOPBACK]
        port = listener.getsockname()[1]
        server = TCPStore(
            name, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        return cls(tuple(dict.fromkeys(chosen)), port, host_addresses.network_namespace(), server)

    def reached(self, timeout: float) -> list[str]:
        """Return the candidates at which this rank reaches the store within `timeout` seconds."""
        here = self.namespace == host_addresses.network_namespace()
        targets = [
            (candidate, address)
            for candidate in self.candidates
            for address in (
                [candidate]
                if host_addresses.is_address(candidate)
                else host_addresses.addresses_of(candidate)
            )
            if here or not host_addresses.belongs_here(address)
        ]
        numbers = connect_all(
            [(address, self.port) for _, address in targets], min(timeout, LONGEST), settle=_SETTLE
        )
        answered = [candidate for (candidate, _), number in zip(targets, numbers, strict=True) if not number]
        return list(dict.fromkeys(answered))

    def tried(self) -> str:
        """Return the addresses of the store in words."""
        return ", ".join(f"{host_and_port(one, self.port)}{said_by_hosts(one)}" for one in self.candidates)


def common(reached: Sequence[Sequence[str]]) -> str | None:
    """Return the best address that every rank reached; None if there is none."""
    return next((one for one in reached[0] if all(one in other for other in reached)), None)


def master_address(rank: int) -> list[str]:
    """Return ``MASTER_ADDR``, which names the host of the job's rank 0, to that rank."""
    address = os.environ.get("MASTER_ADDR")
    return [address] if rank == 0 and address else []
