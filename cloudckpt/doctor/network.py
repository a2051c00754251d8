"""The network between a job's ranks, as `cloudckpt doctor` proves it: by forming their group once."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Self

import torch.distributed as dist
from torch.distributed import DistError, PrefixStore, Store

from cloudckpt.backends.config.endpoint_url import host_and_port
from cloudckpt.backends.errors import CheckpointError, ConfigurationError
from cloudckpt.backends.finding import Finding
from cloudckpt.backends.system.printable import one_line
from cloudckpt.executor.coordination.rendezvous import MeetingPlace
from cloudckpt.executor.network import host_addresses
from cloudckpt.executor.network.agreement import leave_last
from cloudckpt.executor.network.formation import Formation
from cloudckpt.executor.network.network_options import LARGEST_PORT, NetworkOptions

_GOODBYE: Final = 10.0
"""Seconds that rank 0 waits for the others at the end."""
_VARIABLES: Final = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """The place where the ranks of a job meet, and which of them this process is.

    Attributes:
        host: name or address of the first rank's host.
        port: of the store there; rank 0 opens it, or the launcher has.
        rank: of this process.
        world_size: number of ranks.
        from_environment: a launcher such as torchrun has set these, and may have opened the store.
    """

    host: str
    port: int
    rank: int
    world_size: int
    from_environment: bool = False

    @classmethod
    def given(cls, place: str | None, rank: int | None, world_size: int | None) -> Self | None:
        """Parse ``HOST:PORT``, or what torchrun has put in the environment; None without either.

        Raises:
            ConfigurationError: only some of these are given, or one can't be used.
        """
        if place is None and rank is None and world_size is None:
            return cls._of_environment()
        if place is None or rank is None or world_size is None:
            raise ConfigurationError(
                "a rendezvous needs --rendezvous, --rank and --world-size",
                hint="Run the command on every host, as --rendezvous hosta:29500 --rank 0 --world-size 2, or "
                "start it with torchrun",
            )
        host, _, port = place.rpartition(":")
        return cls._checked(host.strip("[]"), port, str(rank), str(world_size), from_environment=False)

    @classmethod
    def _of_environment(cls) -> Self | None:
        values = [os.environ.get(name, "") for name in _VARIABLES]
        if not all(values) or values[3] == "1":
            return None
        return cls._checked(*values, from_environment=True)

    @classmethod
    def _checked(cls, host: str, port: str, rank: str, world_size: str, *, from_environment: bool) -> Self:
        try:
            found = cls(host, int(port), int(rank), int(world_size), from_environment)
        except ValueError:
            found = None
        if (
            found is None
            or not host
            or not 0 < found.port <= LARGEST_PORT
            or not 0 <= found.rank < found.world_size
        ):
            raise ConfigurationError(
                f"rank {rank} of {world_size} at {host}:{port} is no rendezvous",
                hint="Give HOST:PORT, a rank from 0, and the number of ranks",
            )
        return found

    def store(self, timeout: float) -> Store:
        """Open the store on rank 0, unless a launcher has, and connect to it.

        Raises:
            DistError: it can't be opened or reached, or a rank does not come within `timeout` seconds.
        """
        url = "env://" if self.from_environment else f"tcp://{host_and_port(self.host, self.port)}"
        ranks = (-1, -1) if self.from_environment else (self.rank, self.world_size)
        store: Store = next(dist.rendezvous(url, *ranks, timeout=timedelta(seconds=timeout)))[0]
        return store


def own_name() -> Finding:
    """Tell what this host's name resolves to. Saves don't use it, and other software may."""
    name = socket.gethostname()
    found = host_addresses.addresses_of(name)
    here = ", ".join(f"{one} {' '.join(several)}" for one, several in host_addresses.interfaces().items())
    if not found:
        what = f"{name} resolves to no address; this host has {here}"
    else:
        lines = [line for one in found for line in host_addresses.hosts_lines(one) if name in line.split()]
        said = f" (/etc/hosts has '{lines[0]}')" if lines else ""
        what = f"{name} resolves to {', '.join(found)}{said}; this host has {here}"
    if any(not host_addresses.is_loopback(one) and host_addresses.belongs_here(one) for one in found):
        return Finding("own name", "ok", what)
    advice = (
        "Saves take the address from which a rank reaches training's store. If training uses gloo, it needs "
        "GLOO_SOCKET_IFNAME"
    )
    return Finding("own name", "ok", what, advice)


def not_tried() -> Finding:
    """Tell that the network between ranks was not looked at."""
    return Finding(
        "ranks",
        "skipped",
        "the network between hosts is tried under torchrun, or with --rendezvous, --rank and --world-size",
    )


def ranks(rendezvous: Rendezvous, options: NetworkOptions, timeout: float) -> Iterator[Finding]:
    """Have all ranks meet and form the group that saves use. Every rank calls it.

    Args:
        rendezvous: where they meet.
        options: of this rank.
        timeout: seconds for all of it.
    """
    deadline = time.monotonic() + timeout
    at = host_and_port(rendezvous.host, rendezvous.port)
    try:
        store = rendezvous.store(timeout)
    except (DistError, ValueError) as error:
        what = f"rank {rendezvous.rank} of {rendezvous.world_size} did not meet the others at {at}: "
        if host_addresses.addresses_of(rendezvous.host):
            what += one_line(error)
            advice = (
                "Start the command on every rank at the same time, and open this port of that host to all "
                "others"
            )
        else:
            what += f"{rendezvous.host} resolves to no address on host {socket.gethostname()}"
            advice = "Name that host in DNS or in /etc/hosts, or give its address"
        yield Finding("rendezvous", "failed", what, advice)
        return
    yield Finding("rendezvous", "ok", f"{rendezvous.world_size} ranks meet at {at}")
    place = MeetingPlace.at_store(
        rendezvous.rank, rendezvous.world_size, rendezvous.host, rendezvous.port, prefix="cloudckpt/doctor"
    )
    try:
        left = max(1.0, deadline - time.monotonic())
        network = Formation(place, "group", options, deadline, collective_timeout=left).form()
        dist.barrier()
    except CheckpointError as error:
        yield Finding("ranks", "failed", error.message, error.hint or "")
    except RuntimeError as error:
        yield Finding("ranks", "failed", one_line(error), "Look at what the other ranks found")
    else:
        if network.warning is None:
            yield Finding("ranks", "ok", f"all ranks reach each other. {network}")
        else:
            yield Finding("ranks", "warning", f"{network}", network.warning)
    finally:
        with contextlib.suppress(DistError):
            leave_last(PrefixStore(place.prefix, store), rendezvous.rank, rendezvous.world_size, _GOODBYE)
