"""Where the checkpoint processes of a job meet: in the store that training has, or in one of their own.

No port is probed and then bound: a store of our own takes whatever port the system gives it.
"""

from __future__ import annotations

import os
import pickle
import socket
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.checkpoint.utils import _DistWrapper

from cloudckpt.backends.errors import ConfigurationError, ExecutorError

_LARGEST_PORT = 65535


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
        self.local_rank: int = dist.get_node_local_rank(fallback_rank=0)
        self.global_rank: int = dist.get_rank(process_group) if in_group else 0
        self.world_size: int = dist.get_world_size(process_group) if in_group else 1
        self.use_prefix_store: bool = (
            flag("DCP_USE_PREFIX_STORE") if use_prefix_store is None else use_prefix_store
        )
        self.disable_automatic_gc: bool = flag("DCP_DISABLE_AUTOMATIC_GC")
        self.disable_manual_gc: bool = flag("DCP_DISABLE_MANUAL_GC")
        self._hosted: TCPStore | None = None

        def choose() -> tuple[str, int]:
            if self.use_prefix_store:
                return existing_store()
            self._hosted, host = host_store()
            return host, self._hosted.port

        ranks = _DistWrapper(process_group, use_dist=in_group, coordinator_rank=0)
        address = ranks.broadcast("find a store for the checkpoint processes", choose)
        self.tcp_store_master_addr: str = address[0]
        self.tcp_store_master_port: int = address[1]

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

    def connect(self, name: str, timeout: float) -> Store:
        """A connection of its own to the part of the store under ``name``; ``timeout`` in seconds.

        Raises:
            DistError: it can't be reached.
        """
        # One connection serves one caller at a time, and a wait keeps it from all others.
        store = TCPStore(
            self.host, self.port, is_master=False, timeout=timedelta(seconds=timeout), wait_for_workers=False
        )
        return PrefixStore(f"{self.prefix}/{name}", store)


class Meeting:
    """How the ranks of an executor find their place; asked again after a failure, it goes on where it was."""

    def __init__(self, process_group: dist.ProcessGroup | None, use_prefix_store: bool | None) -> None:
        self._group = process_group
        self._rank = dist.get_rank(process_group)
        self._world_size = dist.get_world_size(process_group)
        self._choice = _choice(use_prefix_store)
        self._key: str | None = None
        self._told = False
        self.hosted: TCPStore | None = None

    def place(self, timeout: float) -> MeetingPlace:
        """Agree on a place through the store of the training group, without its collectives.

        Raises:
            CheckpointException: rank 0 found nothing to meet in.
            ExecutorError: rank 0 said nothing within ``timeout`` seconds.
        """
        store = _own_connection(dist.distributed_c10d._get_default_store())  # noqa: SLF001 - the one way to it
        group = self._group.group_name if self._group is not None else "world"
        # One agreement for each executor that the group's ranks make, in the order in which they do.
        if self._key is None:
            count = store.add(f"cloudckpt/{group}/executors/{self._rank}", 1)
            self._key = f"cloudckpt/{group}/place/{count}"
        if self._rank == 0 and not self._told:
            store.set(self._key, pickle.dumps(self._decided()).hex())
            self._told = True
        try:
            store.wait([self._key], timedelta(seconds=timeout))
        except RuntimeError as error:  # what a store raises, of TCP or of files
            raise ExecutorError(
                f"rank 0 did not say within {timeout:g} s where the checkpoint processes meet",
                rank=0,
                hint="Every rank must save at the same steps; raise start_timeout if some come later",
            ) from error
        decided = pickle.loads(bytes.fromhex(store.get(self._key).decode()))  # noqa: S301 - from rank 0
        if isinstance(decided, BaseException):
            raise decided
        address, prefix = decided
        host, port = address or tcp_store_of_training() or _no_store()
        return MeetingPlace(self._rank, self._world_size, host, port, prefix)

    def _decided(self) -> tuple[tuple[str, int] | None, str] | CheckpointException:
        """Rank 0's word: an address, or None for the store that each rank is connected to already."""
        try:
            return self._choice(self), f"cloudckpt/{uuid.uuid4().hex}"
        except Exception as error:  # noqa: BLE001 - every rank is told
            return CheckpointException(
                "find a store for the checkpoint processes", {0: _wrap_exception(error)}
            )

    def host(self) -> tuple[str, int]:
        """Open a store here."""
        self.hosted, address = host_store()
        return address, self.hosted.port

    def training_store_or_host(self) -> tuple[str, int] | None:
        """The store of training where all hosts can reach it, or one opened here."""
        return None if tcp_store_of_training() is not None else self.host()


def _choice(use_prefix_store: bool | None) -> Callable[[Meeting], tuple[str, int] | None]:
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
    if port is not None and not (port.isascii() and port.isdigit() and 0 < int(port) <= _LARGEST_PORT):
        raise ConfigurationError(
            f"MASTER_PORT is {port!r}, and DCP_USE_PREFIX_STORE=1 meets there",
            hint=f"Give a port from 1 to {_LARGEST_PORT}",
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
    if not grouped():
        return None
    store = _bottom(dist.distributed_c10d._get_default_store())  # noqa: SLF001 - the one way to it
    return (store.host, store.port) if isinstance(store, TCPStore) else None


def host_store() -> tuple[TCPStore, str]:
    """Open a store on a port that the system picks, and say under which name this host is reached."""
    names = [socket.getfqdn(), socket.gethostname(), "127.0.0.1"]
    # MASTER_ADDR is where rank 0 of the job is, which need not be this group's.
    if (not grouped() or dist.get_rank() == 0) and os.environ.get("MASTER_ADDR"):
        names.insert(0, os.environ["MASTER_ADDR"])
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for name in names:
        try:
            with closing(socket.create_connection((name, store.port), timeout=5)):
                return store, name
        except OSError:
            continue
    raise ConfigurationError(
        f"no name of this host leads to itself: {', '.join(names)}", hint="Set MASTER_ADDR to its address"
    )


def flag(name: str) -> bool:
    """Whether an environment variable is exactly ``"1"``, as DCP reads its own."""
    return os.environ.get(name) == "1"


def grouped() -> bool:
    """Whether training has a process group at all."""
    return dist.is_available() and dist.is_initialized()


def _bottom(store: Store) -> Store:
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def _own_connection(store: Store) -> Store:
    """The same store through another connection, so that waiting keeps it from nobody."""
    clone: Callable[[], Store] | None = getattr(store, "clone", None)  # not in older versions of torch
    return clone() if clone is not None else store


def _no_store() -> NoReturn:
    raise ExecutorError("rank 0 meets in training's TCP store, and this rank has none")
