"""Rendezvous of a job's checkpoint processes: in the store that training has, or in one of their own.

No port is probed and then bound: a store of our own is opened on the socket that listens already.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final, Self, TypeVar

import torch.distributed as dist
from torch.distributed import DistError, PrefixStore, Store, TCPStore

from cloudckpt.backends.config.endpoint_url import host_and_port
from cloudckpt.backends.errors import CheckpointError, ConfigurationError, ExecutorError
from cloudckpt.backends.system.printable import one_line
from cloudckpt.backends.system.system_limits import in_thread
from cloudckpt.backends.torch_private import DistWrapper
from cloudckpt.executor import forks
from cloudckpt.executor.network import absence, host_addresses
from cloudckpt.executor.network.hosting import Offer, common, master_address
from cloudckpt.executor.network.members import said_by_hosts
from cloudckpt.executor.network.network_options import LARGEST_PORT, NetworkOptions
from cloudckpt.executor.network.probe import LONGEST

T = TypeVar("T")

_GRACE: Final = 5.0
"""Seconds that an answer of the store may take beyond the time that it was given."""


class ProcessGroupInfo:
    """This rank's place among the checkpoint processes, and the TCP store in which they meet.

    On every rank of ``process_group`` together: rank 0 decides on the store and tells the others. Where
    ``torch.distributed`` is not initialised, a single process is meant.

    Args:
        process_group: the training group; the default one when None.
        use_prefix_store: meet in the store that is there already. None reads ``DCP_USE_PREFIX_STORE``, where
            exactly ``"1"`` turns it on. When on, ``MASTER_ADDR`` and ``MASTER_PORT`` name the store, or the
            TCP store of the default group serves. When off, rank 0 opens a store of its own, on a port that
            the system picks; it lives as long as this object.

    Attributes:
        local_rank: rank among those of this host.
        global_rank: rank in ``process_group``.
        world_size: ranks in ``process_group``.
        tcp_store_master_addr: host of the store.
        tcp_store_master_port: port of the store.
        use_prefix_store: as decided.
        disable_automatic_gc: ``DCP_DISABLE_AUTOMATIC_GC`` is ``"1"``: Python collects no garbage by itself.
        disable_manual_gc: ``DCP_DISABLE_MANUAL_GC`` is ``"1"``: nor after each save.

    Raises:
        CheckpointException: on every rank, when ``MASTER_ADDR`` or ``MASTER_PORT`` is needed and missing, or
            is malformed.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None = None, use_prefix_store: bool | None = None
    ) -> None:
        in_group = grouped()
        options = NetworkOptions.given()
        self.global_rank: int = dist.get_rank(process_group) if in_group else 0
        self.world_size: int = dist.get_world_size(process_group) if in_group else 1
        self.use_prefix_store: bool = (
            flag("DCP_USE_PREFIX_STORE") if use_prefix_store is None else use_prefix_store
        )
        self._read_environment()
        self._hosted: TCPStore | None = None

        def choose() -> tuple[str, int] | Offer:
            if self.use_prefix_store:
                return existing_store()
            offer = open_store(options)
            self._hosted = offer.server
            return offer

        ranks = DistWrapper(process_group, use_dist=in_group, coordinator_rank=0)
        found = ranks.broadcast("find a store for the checkpoint processes", choose)
        if isinstance(found, Offer):
            offer = found

            def pick(reached: list[list[str]]) -> tuple[str, int]:
                address = common(reached)
                if address is None:
                    raise out_of_reach(offer, [rank for rank, some in enumerate(reached) if not some])
                return address, offer.port

            found = ranks.all_reduce("reach the store", lambda: offer.reached(LONGEST), pick)
        self.tcp_store_master_addr: str = found[0]
        self.tcp_store_master_port: int = found[1]

    @classmethod
    def of(
        cls, rank: int, world_size: int, address: str, port: int, *, use_prefix_store: bool = True
    ) -> Self:
        """Describe ranks that have agreed on a store already, and read the rest from the environment now.

        No collective. The executor calls it at each start of its checkpoint processes.

        Args:
            rank: of this process.
            world_size: number of ranks.
            address: host of the store; empty for a process that saves alone.
            port: port of the store.
            use_prefix_store: False if rank 0 has opened the store for the checkpoint processes.
        """
        info = cls.__new__(cls)
        info.global_rank, info.world_size = rank, world_size
        info.tcp_store_master_addr, info.tcp_store_master_port = address, port
        info.use_prefix_store = use_prefix_store
        vars(info)["_hosted"] = None
        cls._read_environment(info)
        return info

    def _read_environment(self) -> None:
        self.local_rank: int = dist.get_node_local_rank(fallback_rank=0)
        self.disable_automatic_gc: bool = flag("DCP_DISABLE_AUTOMATIC_GC")
        self.disable_manual_gc: bool = flag("DCP_DISABLE_MANUAL_GC")

    def __getstate__(self) -> dict[str, Any]:
        """All but the store itself, which stays with the process that opened it."""
        return self.__dict__ | {"_hosted": None}

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name[0] != "_")
        return f"{type(self).__name__}({shown})"


@dataclass(frozen=True, slots=True)
class MeetingPlace:
    """A store as one rank reaches it, and the prefix that belongs to one executor."""

    info: ProcessGroupInfo
    prefix: str
    group: str = "world"

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.info.global_rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.info.world_size

    @property
    def host(self) -> str:
        """Host of the store."""
        return self.info.tcp_store_master_addr

    @property
    def port(self) -> int:
        """Port of the store."""
        return self.info.tcp_store_master_port

    @classmethod
    def at_store(cls, rank: int, world_size: int, host: str, port: int, prefix: str) -> MeetingPlace:
        """Return the place of a rank in a store that is known."""
        return cls(ProcessGroupInfo.of(rank, world_size, host, port), prefix)

    def read_again(self, address: tuple[str, int] | None = None) -> MeetingPlace:
        """Return the same ranks and prefix, with what the environment says now, in this store or another.

        Args:
            address: host and port of the other store.
        """
        host, port = address or (self.host, self.port)
        info = ProcessGroupInfo.of(
            self.rank, self.world_size, host, port, use_prefix_store=self.info.use_prefix_store
        )
        return replace(self, info=info)

    @property
    def at(self) -> str:
        """Host and port of the store as one text."""
        return host_and_port(self.host, self.port)

    def connect(self, name: str, timeout: float) -> Store:
        """Return a connection of its own to the part of the store under ``name``; ``timeout`` in seconds.

        Raises:
            ExecutorError: it can't be reached.
        """
        # One connection serves one caller at a time, and a wait keeps it from all others.
        try:
            store = TCPStore(
                self.host,
                self.port,
                is_master=False,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
            )
        except DistError as error:
            raise self.absent(error) from error
        return PrefixStore(f"{self.prefix}/{name}", store)

    def bounded(self, what: str, ask: Callable[[], T], timeout: float) -> T:
        """Return the answer of a store that may be cut off, in which case it would never return.

        Raises:
            ExecutorError: the store does not answer.
        """
        try:
            return in_thread(ask, f"cloudckpt-{what}").result(timeout + _GRACE)
        except (TimeoutError, DistError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise unreached(
                f"the ranks could not {what}: the store at {self.at} "
                f"did not answer rank {self.rank} on host {socket.gethostname()} within {timeout:g} s "
                f"({type(error).__name__}: {one_line(error)})",
                rank=self.rank,
                hint="Look whether that host is up and reachable from here; the next call tries again",
            ) from error

    def absent(self, error: Exception) -> ExecutorError:
        """Return the same error as `unreachable`, once the other ranks have been sent it."""
        unreachable = self.unreachable(error)
        absence.report(self.group, self.rank, unreachable.message)
        return unreachable

    def unreachable(self, error: Exception) -> ExecutorError:
        """Return the error for a store that this rank can't connect to."""
        found = host_addresses.addresses_of(self.host)
        named = (
            ", ".join(f"{host_and_port(one, self.port)}{said_by_hosts(one)}" for one in found) or "no address"
        )
        if not host_addresses.is_address(self.host):
            named = f"{self.at}, which is {named}"
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else one_line(error)
        return unreached(
            f"rank {self.rank} on host {socket.gethostname()} can't open a connection to the store at "
            f"{named}: {reason}",
            rank=self.rank,
            hint=f"Let every host of the job open connections to port {self.port} of that host while the job "
            "runs, and see that its process is alive; the next save tries again",
        )


def existing_store() -> tuple[str, int]:
    """Host and port of the store that the environment names, or that the default group has.

    Raises:
        ConfigurationError: neither is there, or the environment's is malformed.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    training = tcp_store_of_training()
    if port is not None and not (port.isascii() and port.isdigit() and 0 < int(port) <= LARGEST_PORT):
        raise ConfigurationError(
            f"MASTER_PORT is {port!r}, and DCP_USE_PREFIX_STORE=1 meets there",
            hint=f"Give a port from 1 to {LARGEST_PORT}",
        )
    if host and port is not None:
        return host, int(port)
    if host is not None and not host:
        raise ConfigurationError("MASTER_ADDR is empty", hint="Give the host of the store, or unset it")
    if training is not None:
        return training
    missing = " and ".join(name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ)
    raise ConfigurationError(
        f"the prefix store needs {missing}, and training has no TCP store that could serve",
        hint="Set both, as torchrun does, or leave DCP_USE_PREFIX_STORE off",
    )


def tcp_store_of_training() -> tuple[str, int] | None:
    """Host and port of the default group's store, where it is a TCP store."""
    store = absence.training_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return (store.host, store.port) if isinstance(store, TCPStore) else None


def open_store(options: NetworkOptions) -> Offer:
    """Open a store on this host, and say under which addresses it may be reached.

    Raises:
        ConfigurationError: this host has no such interface, or no port of the range is free.
    """
    preferred = master_address(dist.get_rank() if grouped() else 0)
    training = tcp_store_of_training()
    if training is not None:
        # From the address by which this rank reaches training's store, others probably reach this rank.
        with contextlib.suppress(OSError):
            preferred.append(host_addresses.route_to(*training, LONGEST).local)
    return Offer.opened(options, preferred)


def unreached(message: str, *, rank: int | None, hint: str) -> ExecutorError:
    """Return the error for a store that a rank can't reach."""
    error = ExecutorError(message, rank=rank, hint=hint)
    error.unreachable = True
    return error


def out_of_reach(offer: Offer, shut_out: list[int]) -> ExecutorError:
    """Return the error for a store that rank 0 has opened and other ranks can't reach."""
    ranks = ", ".join(map(str, shut_out))
    return unreached(
        f"rank {ranks} can't reach the store that rank 0 has opened for the checkpoint processes at "
        f"{offer.tried()}"
        if shut_out
        else f"the ranks reach the store that rank 0 has opened at no common address: {offer.tried()}",
        rank=shut_out[0] if shut_out else None,
        hint="Open the port between the hosts (port_range= keeps it within a range), name the address with "
        "interface= or CLOUDCKPT_INTERFACE, or leave DCP_USE_PREFIX_STORE unset to use training's store",
    )


def flag(name: str) -> bool:
    """Return True if an environment variable is exactly ``"1"``, as DCP reads its own."""
    return os.environ.get(name) == "1"


def grouped() -> bool:
    """Return True if training has a process group in this process, and did not inherit it by a fork."""
    return forks.has_own_group()
