"""The choice of the store in which an executor's ranks meet: made by rank 0, and made anew where it fails.

Rank 0 publishes its choices in the store of training, as numbered *decisions*. A rank that can't reach the
store of a decision waits for the next one. A rank that only missed others looks whether there is one.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NoReturn

import torch.distributed as dist
from torch.distributed import DistError, Store, TCPStore
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.backends.errors import ExecutorError
from cloudckpt.backends.system.system_limits import in_thread
from cloudckpt.backends.torch_private import wrap_exception
from cloudckpt.executor.coordination import remote_errors, wire_format
from cloudckpt.executor.coordination.rendezvous import (
    MeetingPlace,
    ProcessGroupInfo,
    existing_store,
    flag,
    open_store,
    out_of_reach,
    tcp_store_of_training,
)
from cloudckpt.executor.network import absence
from cloudckpt.executor.network.hosting import Offer
from cloudckpt.executor.network.network_options import NetworkOptions

Contact = Literal["none", "missed", "lost"]
"""The outcome of the last decision: none was made, ranks were missing, or its store can't be reached."""


@dataclass(frozen=True, slots=True)
class _Offered:
    """An `Offer` on its way to another rank."""

    candidates: tuple[str, ...]
    port: int
    namespace: str

    def opened(self) -> Offer:
        """Return the offer."""
        return Offer(self.candidates, self.port, self.namespace)


@dataclass(frozen=True, slots=True)
class _Decision:
    """The place where the ranks meet: an address, an offer, or training's store. Or rank 0's failure."""

    prefix: str
    address: tuple[str, int] | None = None
    offer: _Offered | None = None
    failure: bytes | None = None


class Meeting:
    """The way in which the ranks of an executor find the store where they meet.

    Args:
        process_group: the ranks; None for all of them.
        use_prefix_store: as in `ProcessGroupInfo`; None takes training's store where the environment says
            nothing.
        options: addresses and ports for a store of their own.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None, use_prefix_store: bool | None, options: NetworkOptions
    ) -> None:
        self._group = process_group
        self._rank = dist.get_rank(process_group)
        self._world_size = dist.get_world_size(process_group)
        self._use_prefix_store = use_prefix_store
        self._options = options
        self._key: str | None = None
        self._decision = 0
        """Number of the newest decision that this rank knows."""
        self._place: MeetingPlace | None = None
        self.hosted: TCPStore | None = None
        self.training: Store | None = absence.training_store()
        """Kept, as rank 0 may serve it: waiting for a save works after ``destroy_process_group()``."""

    def place(self, timeout: float, call: str = "this call", contact: Contact = "none") -> MeetingPlace:
        """Agree on a place through the store of the training group, without its collectives.

        Args:
            timeout: seconds to wait for rank 0.
            call: made by this rank, as an error names it.
            contact: what came of the place before.

        Raises:
            CheckpointException: rank 0 found no store to meet in.
            ExecutorError: rank 0 did not come within ``timeout`` seconds, or this rank can't reach the store.
        """
        deadline = time.monotonic() + timeout
        group = self._group.group_name if self._group is not None else "world"
        store = self._training_store(group, timeout)
        key = self._key = self._key or self._counted(store, group)
        known = self._place
        if known is None:
            contact = "none"
        if self._rank == 0 and contact != "missed":
            store.set(f"{key}/{self._decision + 1}", wire_format.text(self._decided()))
        # Without another decision a rank tries the store again, in which the others may wait for it.
        wait = {"none": timeout, "missed": None, "lost": timeout / 2}[contact]
        if not self._is_next(store, key, wait):
            if known is not None:
                return known
            raise ExecutorError(
                f"rank 0 did not come to {call} within start_timeout ({timeout:g} s), to say where the "
                "checkpoint processes meet",
                rank=0,
                hint="Every rank must make this call; raise start_timeout if some come later",
            )
        self._place = None
        while store.check([f"{key}/{self._decision + 1}"]):
            self._decision += 1
        at = f"{key}/{self._decision}"
        decided = wire_format.message(store.get(at), _Decision, at)
        if decided.failure is not None:  # on every rank: the next call has rank 0 decide anew
            raise remote_errors.loads(decided.failure)
        offer, prefix = decided.offer, decided.prefix
        hosted = offer is not None
        # Known from here on: where the store proves unreachable, the next call waits for another decision.
        host, port = (
            (offer.candidates[0], offer.port) if offer is not None else self._address(decided.address)
        )
        self._place = self._at(host, port, prefix, group, hosted=hosted)
        if offer is not None:
            host, port = self._reached(offer.opened(), group, deadline)
            self._place = self._at(host, port, prefix, group, hosted=True)
        return self._place

    def address_now(self) -> tuple[str, int] | None:
        """Return host and port of the store for a new group of processes, as rank 0 finds it now.

        None stands for the store in which the ranks have met: a store that rank 0 has opened stays.

        Raises:
            ConfigurationError: the environment names no store.
        """
        if self.hosted is not None or self._prefers_training():
            return None
        return existing_store()

    def _at(self, host: str, port: int, prefix: str, group: str, *, hosted: bool) -> MeetingPlace:
        info = ProcessGroupInfo.of(self._rank, self._world_size, host, port, use_prefix_store=not hosted)
        return MeetingPlace(info, prefix, group)

    def _address(self, found: tuple[str, int] | None) -> tuple[str, int]:
        return found or tcp_store_of_training() or _no_store()

    def _counted(self, store: Store, group: str) -> str:
        """Return the key of this executor: ranks make executors for a group in the same order."""
        # A launcher that restarts the job may keep the store, with counts that ranks had come to.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        job = f"cloudckpt/{group}/{restart}-{self._world_size}"
        return f"{job}/place/{store.add(f'{job}/executors/{self._rank}', 1)}"

    def _is_next(self, store: Store, key: str, wait: float | None) -> bool:
        """Wait so many seconds for the next decision, or only look, and return True if there is one."""
        following = f"{key}/{self._decision + 1}"
        if wait is None:
            return bool(store.check([following]))
        try:
            store.wait([following], timedelta(seconds=max(0.01, wait)))
        except RuntimeError:  # what a store raises, of TCP or of files
            return False
        return True

    def _training_store(self, group: str, timeout: float) -> Store:
        """Return training's store through a connection of our own, so that waiting blocks no others."""
        store = absence.training_store()
        clone: Callable[[], Store] | None = getattr(store, "clone", None)  # not in older versions of torch
        if store is None or clone is None:
            return store or _no_store()
        # It connects with training's timeout, which may be half an hour.
        try:
            return in_thread(clone, "cloudckpt-rendezvous").result(timeout)
        except (DistError, TimeoutError) as error:
            host, port = tcp_store_of_training() or _no_store()
            place = self._at(host, port, "", group, hosted=False)
            late = TimeoutError(f"no answer within {timeout:g} s")
            raise place.absent(error if isinstance(error, DistError) else late) from error

    def _decided(self) -> _Decision:
        """Rank 0's decision: an address, an offer, or neither for the store that training has."""
        try:
            found = self._chosen()
        except Exception as error:  # noqa: BLE001 - every rank raises it
            failed = CheckpointException(
                "find a store for the checkpoint processes", {0: wrap_exception(error)}
            )
            return _Decision("", failure=remote_errors.dumps(failed))
        prefix = f"cloudckpt/{uuid.uuid4().hex}"
        if isinstance(found, Offer):
            return _Decision(prefix, offer=_Offered(found.candidates, found.port, found.namespace))
        return _Decision(prefix, address=found)

    def _prefers_training(self) -> bool:
        return self._use_prefix_store is None and "DCP_USE_PREFIX_STORE" not in os.environ

    def _chosen(self) -> tuple[str, int] | Offer | None:
        if self._prefers_training():
            return None if tcp_store_of_training() is not None else self._host()
        wanted = flag("DCP_USE_PREFIX_STORE") if self._use_prefix_store is None else self._use_prefix_store
        return existing_store() if wanted else self._host()

    def _host(self) -> Offer:
        """Open a store here."""
        offer = open_store(self._options)
        self.hosted = offer.server
        return offer

    def _reached(self, offer: Offer, group: str, deadline: float) -> tuple[str, int]:
        """Return an address at which this rank reaches rank 0's store. Other ranks may use others."""
        reached = offer.reached(max(0.1, deadline - time.monotonic()))
        if reached:
            return reached[0], offer.port
        error = out_of_reach(offer, [self._rank])
        absence.report(group, self._rank, error.message)
        raise error


def _no_store() -> NoReturn:
    raise ExecutorError("rank 0 meets in training's TCP store, and this rank has none")
