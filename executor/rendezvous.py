"""Rendezvous of a job's checkpoint processes: in the store that training has, or in one of their own.

No port is probed and then bound: a store of our own is opened on the socket that listens already.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, NoReturn, TypeVar

import torch.distributed as dist
from torch.distributed import DistError, PrefixStore, Store, TCPStore
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.checkpoint.utils import _DistWrapper

from cloudckpt.backends.endpoint_url import host_and_port
from cloudckpt.backends.errors import CheckpointError, ConfigurationError, ExecutorError
from cloudckpt.backends.printable import one_line
from cloudckpt.backends.system_limits import in_thread
from cloudckpt.executor import forks
from cloudckpt.executor.network import absence, addresses
from cloudckpt.executor.network.hosting import Offer, common, master_address
from cloudckpt.executor.network.members import said_by_hosts
from cloudckpt.executor.network.network_options import LARGEST_PORT, NetworkOptions
from cloudckpt.executor.network.probe import LONGEST

T = TypeVar("T")

_GRACE: Final = 5.0
"""Seconds that an answer of the store may take beyond the time that it was given."""


class ProcessGroupInfo:
    """Who this rank is among the checkpoint processes, and which TCP store they meet in.

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
        self.local_rank: int = dist.get_node_local_rank(fallback_rank=0)
        self.global_rank: int = dist.get_rank(process_group) if in_group else 0
        self.world_size: int = dist.get_world_size(process_group) if in_group else 1
        self.use_prefix_store: bool = (
            flag("DCP_USE_PREFIX_STORE") if use_prefix_store is None else use_prefix_store
        )
        self.disable_automatic_gc: bool = flag("DCP_DISABLE_AUTOMATIC_GC")
        self.disable_manual_gc: bool = flag("DCP_DISABLE_MANUAL_GC")
        self._hosted: TCPStore | None = None

        def choose() -> tuple[str, int] | Offer:
            if self.use_prefix_store:
                return existing_store()
            offer = open_store(options)
            self._hosted = offer.server
            return offer

        ranks = _DistWrapper(process_group, use_dist=in_group, coordinator_rank=0)
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

    def __getstate__(self) -> dict[str, Any]:
        """All but the store itself, which stays with the process that opened it."""
        return self.__dict__ | {"_hosted": None}

    def __repr__(self) -> str:
        told = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name[0] != "_")
        return f"{type(self).__name__}({told})"


@dataclass(frozen=True, slots=True)
class MeetingPlace:
    """A store as one rank reaches it, and the prefix that belongs to one executor."""

    rank: int
    world_size: int
    host: str
    port: int
    prefix: str
    group: str = "world"

    @property
    def at(self) -> str:
        """Host and port of the store as one text."""
        return host_and_port(self.host, self.port)

    def connect(self, name: str, timeout: float) -> Store:
        """A connection of its own to the part of the store under ``name``; ``timeout`` in seconds.

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
            raise ExecutorError(
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
        found = addresses.addresses_of(self.host)
        named = (
            ", ".join(f"{host_and_port(one, self.port)}{said_by_hosts(one)}" for one in found) or "no address"
        )
        if not addresses.is_address(self.host):
            named = f"{self.at}, which is {named}"
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else one_line(error)
        return ExecutorError(
            f"rank {self.rank} on host {socket.gethostname()} can't open a connection to the store at "
            f"{named}: {reason}",
            rank=self.rank,
            hint=f"Let every host of the job open connections to port {self.port} of that host while the job "
            "runs, and see that its process is alive; the next save tries again",
        )


class Meeting:
    """The way in which the ranks of an executor find their place.

    After a failure, the next call goes on where it was.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None, use_prefix_store: bool | None, options: NetworkOptions
    ) -> None:
        self._group = process_group
        self._rank = dist.get_rank(process_group)
        self._world_size = dist.get_world_size(process_group)
        self._choice = _choice(use_prefix_store)
        self._options = options
        self._key: str | None = None
        self._told = False
        self.hosted: TCPStore | None = None
        self.training: Store | None = absence.training_store()
        """Kept, as rank 0 may serve it: waiting for a save works after ``destroy_process_group()``."""

    def place(self, timeout: float, call: str = "this call") -> MeetingPlace:
        """Agree on a place through the store of the training group, without its collectives.

        Args:
            timeout: seconds to wait for rank 0.
            call: made by this rank, as an error names it.

        Raises:
            CheckpointException: rank 0 found nothing to meet in.
            ExecutorError: rank 0 did not come within ``timeout`` seconds, or a rank can't reach its store.
        """
        deadline = time.monotonic() + timeout
        group = self._group.group_name if self._group is not None else "world"
        store = self._training_store(group, timeout)
        # One agreement for each executor that the group's ranks make, in the order in which they do.
        if self._key is None:
            # A launcher that restarts the job may keep the store, with counts that ranks had come to.
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            job = f"cloudckpt/{group}/{restart}-{self._world_size}"
            count = store.add(f"{job}/executors/{self._rank}", 1)
            self._key = f"{job}/place/{count}"
        if self._rank == 0 and not self._told:
            store.set(self._key, pickle.dumps(self._decided()).hex())
            self._told = True
        word = self._word(store, self._key, deadline, timeout, call)
        decided = pickle.loads(bytes.fromhex(word.decode()))  # noqa: S301 - from rank 0
        if isinstance(decided, BaseException):
            self._key, self._told = None, False  # on every rank: the next call asks anew
            raise decided
        found, prefix = decided
        if isinstance(found, Offer):
            found = self._reached(found, group, deadline)
        host, port = found or tcp_store_of_training() or _no_store()
        return MeetingPlace(self._rank, self._world_size, host, port, prefix, group)

    def _training_store(self, group: str, timeout: float) -> Store:
        """The store of training through a connection of our own, so that waiting does not block others."""
        store = absence.training_store()
        clone: Callable[[], Store] | None = getattr(store, "clone", None)  # not in older versions of torch
        if store is None or clone is None:
            return store or _no_store()
        # It connects with training's timeout, which may be half an hour.
        try:
            return in_thread(clone, "cloudckpt-rendezvous").result(timeout)
        except (DistError, TimeoutError) as error:
            place = MeetingPlace(
                self._rank, self._world_size, *(tcp_store_of_training() or _no_store()), "", group
            )
            late = TimeoutError(f"no answer within {timeout:g} s")
            raise place.absent(error if isinstance(error, DistError) else late) from error

    def _word(self, store: Store, key: str, deadline: float, timeout: float, call: str) -> bytes:
        try:
            store.wait([key], timedelta(seconds=max(0.01, deadline - time.monotonic())))
            return store.get(key)
        except RuntimeError as error:  # what a store raises, of TCP or of files
            raise ExecutorError(
                f"rank 0 did not come to {call} within start_timeout ({timeout:g} s), to say where the "
                "checkpoint processes meet",
                rank=0,
                hint="Every rank must make this call; raise start_timeout if some come later",
            ) from error

    def _decided(self) -> tuple[tuple[str, int] | Offer | None, str] | CheckpointException:
        """Rank 0's word: an address, an offer, or None for the store that training has."""
        try:
            return self._choice(self), f"cloudckpt/{uuid.uuid4().hex}"
        except Exception as error:  # noqa: BLE001 - every rank is told
            return CheckpointException(
                "find a store for the checkpoint processes", {0: _wrap_exception(error)}
            )

    def _reached(self, offer: Offer, group: str, deadline: float) -> tuple[str, int]:
        """An address at which this rank reaches rank 0's store. Other ranks may use others."""
        reached = offer.reached(max(0.1, deadline - time.monotonic()))
        if reached:
            return reached[0], offer.port
        error = out_of_reach(offer, [self._rank])
        absence.report(group, self._rank, error.message)
        raise error

    def host(self) -> Offer:
        """Open a store here."""
        offer = open_store(self._options)
        self.hosted = offer.server
        return offer

    def training_store_or_host(self) -> Offer | None:
        """The store of training where all hosts can reach it, or one opened here."""
        return None if tcp_store_of_training() is not None else self.host()


def _choice(use_prefix_store: bool | None) -> Callable[[Meeting], tuple[str, int] | Offer | None]:
    if use_prefix_store is None and "DCP_USE_PREFIX_STORE" not in os.environ:
        return Meeting.training_store_or_host
    wanted = flag("DCP_USE_PREFIX_STORE") if use_prefix_store is None else use_prefix_store
    return (lambda _: existing_store()) if wanted else Meeting.host


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
            preferred.append(addresses.route_to(*training, LONGEST).local)
    return Offer.opened(options, preferred)


def out_of_reach(offer: Offer, shut_out: list[int]) -> ExecutorError:
    """Return the error for a store that rank 0 has opened and other ranks can't reach."""
    ranks = ", ".join(map(str, shut_out))
    return ExecutorError(
        f"rank {ranks} can't reach the store that rank 0 has opened for the checkpoint processes at "
        f"{offer.tried()}"
        if shut_out
        else f"the ranks reach the store that rank 0 has opened at no common address: {offer.tried()}",
        rank=shut_out[0] if shut_out else None,
        hint="Open the port between the hosts (port_range= keeps it within a range), name the address with "
        "interface= or CLOUDCKPT_INTERFACE, or leave DCP_USE_PREFIX_STORE unset to use training's store",
    )


def flag(name: str) -> bool:
    """Whether an environment variable is exactly ``"1"``, as DCP reads its own."""
    return os.environ.get(name) == "1"


def grouped() -> bool:
    """Return True if training has a process group in this process, and did not inherit it by a fork."""
    return forks.has_own_group()


def _no_store() -> NoReturn:
    raise ExecutorError("rank 0 meets in training's TCP store, and this rank has none")
