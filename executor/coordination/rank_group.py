"""The ranks that an executor serves: where they meet, and their answers to a call that all make."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from cloudckpt.backends.errors import ConfigurationError, ExecutorError
from cloudckpt.executor.coordination import rank_outcomes
from cloudckpt.executor.coordination.call_comparison import Call, CallComparison
from cloudckpt.executor.coordination.consensus import Consensus, SoloConsensus
from cloudckpt.executor.coordination.final_step import FinalStep, Notify
from cloudckpt.executor.coordination.meeting_store import Contact, Meeting
from cloudckpt.executor.coordination.rendezvous import MeetingPlace, grouped, tcp_store_of_training
from cloudckpt.executor.coordination.store_consensus import StoreConsensus
from cloudckpt.executor.network.network_options import NetworkOptions


class RankGroup:
    """The ranks of one executor, as one of them sees them. A single process agrees with itself.

    No call uses a collective: ranks exchange values through the store in which they meet.

    Args:
        timeout: seconds that the ranks wait for each other.
        use_prefix_store: where they meet, as in `ProcessGroupInfo`.
        network: addresses and ports for a store of their own.
    """

    def __init__(self, timeout: float, use_prefix_store: bool | None, network: NetworkOptions) -> None:
        self._timeout = timeout
        self._use_prefix_store = use_prefix_store
        self._network = network
        self._served: tuple[dist.ProcessGroup | None, bool] | None = None
        """The group of the first call that binds, and True where this process is alone."""
        self._default_group: weakref.ref[Any] | None = None
        self._meeting: Meeting | None = None
        self._roll: CallComparison | None = None
        self._final_step: FinalStep | None = None
        self._contact: Contact | None = None
        """The outcome of the last meeting in the known place; None where the ranks have met."""
        self._closed = False
        self.place: MeetingPlace | None = None
        self.consensus: Consensus = SoloConsensus()

    @property
    def rank(self) -> int:
        """This process's rank; 0 for a single process, and before the ranks have met."""
        return self.place.rank if self.place is not None else 0

    def gather(
        self,
        process_group: dist.ProcessGroup | None,
        no_dist: bool,
        call: str,
        *,
        saves: bool = True,
    ) -> None:
        """Agree with the other ranks where to meet, at the first call and after one that failed.

        Args:
            process_group: the ranks; None for all of them.
            no_dist: this process alone is meant.
            call: made by this rank, as an error names it.
            saves: the call takes part in a save. Others work after ``destroy_process_group()``, and do not
                bind a process that is still alone to stay so.

        Raises:
            ConfigurationError: an earlier call named another group.
            ExecutorError: the executor is closed, its group was destroyed, rank 0 did not come within the
                time, or this rank can't reach the store.
        """
        self._check_open()
        alone = no_dist or not grouped() or dist.get_world_size(process_group) == 1
        known = self._served is not None and self._is_known(process_group, alone, call, saves)
        if known:
            return
        if self._meeting is not None or not alone:
            with self.meeting():
                self._meet(process_group, call)
        elif not saves:
            return
        self._served = (process_group, alone)

    def _is_known(self, process_group: dist.ProcessGroup | None, alone: bool, call: str, saves: bool) -> bool:
        """Make sure that a call is of the ranks that have met; False where they have to meet anew.

        Raises:
            ConfigurationError: it names another group.
            ExecutorError: their group was destroyed, and the call takes part in a save.
        """
        if self._default_group is not None and not (grouped() and self._default_group() is dist.group.WORLD):
            if not saves:
                return True
            raise ExecutorError(
                f"{call} came after destroy_process_group(), and the ranks of this executor met in the "
                "process group that was destroyed",
                rank=self.rank,
                hint="Save before destroy_process_group(), or make a new Checkpointer; wait(), close() and "
                "the handles of earlier saves work after it",
            )
        if self._served == (process_group, alone):
            return self._contact is None
        if self._default_group is None and not alone:
            raise ConfigurationError(
                "this executor has saved as a single process, and torch.distributed was initialized since",
                hint="Make a new Checkpointer or ProcessExecutor after init_process_group()",
            )
        raise ConfigurationError(
            "an executor serves one process group, and this call names another than the first",
            hint="Make an executor for each",
        )

    def _meet(self, process_group: dist.ProcessGroup | None, call: str) -> None:
        contact, self._contact = self._contact, None
        if self._meeting is None:
            self._meeting = Meeting(process_group, self._use_prefix_store, self._network)
        place = self._meeting.place(self._timeout, call, contact or "none")
        if self.place is not None and place.prefix == self.place.prefix:
            return
        self.place = place
        self._default_group = weakref.ref(dist.group.WORLD)
        self.consensus = StoreConsensus(place, self._meeting.address_now)
        self._roll = CallComparison(place)
        if self._final_step is not None:
            self._final_step.move(place, self._stores)

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Notice errors of a block in which the ranks meet: the next call of `gather` acts on them."""
        try:
            yield
        except ExecutorError as error:
            self.failed(error)
            raise

    def failed(self, error: BaseException) -> None:
        """Have the next call look for another place, if an error says that ranks did not meet in this one."""
        if isinstance(error, ExecutorError):
            self._contact = "lost" if error.unreachable else self._contact or "missed"

    def broadcast_bool(self, call: Call, value: bool) -> bool:
        """Return rank 0's value, on every rank. All ranks call it, in the same order with all other calls.

        Raises:
            ExecutorError: rank 0 did not come within the time.
        """
        self._check_open()
        if self._roll is None:
            return value
        with self.meeting():
            return self._roll.broadcast_bool(call, value, self._timeout)

    def confer(self, call: Call, ask: Callable[[], bool]) -> bool:
        """Ask on every rank, and return rank 0's answer, or raise what ``ask`` raised on any rank, on each.

        A "yes" of rank 0 does not wait for the others.

        Raises:
            ConfigurationError: another rank makes another call.
            ExecutorError: a rank did not come within the time, or was interrupted.
        """
        self._check_open()
        if self._roll is None:
            return ask()
        with self.meeting():
            return rank_outcomes.confer(self._roll, call, ask, self.rank, self._timeout)

    def meet(self, call: Call) -> None:
        """Wait until every rank makes this call: before a collective, which would wait longer.

        After `close`, ranks that met in a store of this executor's own are not waited for.

        Raises:
            ConfigurationError: another rank makes another call.
            ExecutorError: a rank did not come within the time, or was interrupted.
        """
        if self._roll is None or self.place is None:
            return
        if not self._closed or (self.place.host, self.place.port) == tcp_store_of_training():
            with self.meeting():
                rank_outcomes.meet(self._roll, call, self.rank, self._timeout)

    def final_step(self, notify: Notify) -> FinalStep:
        """Return what agrees with the other ranks on the last of the calls that their trainers make.

        Every rank calls it once, and in the same order with all other calls.
        """
        self._check_open()
        self._final_step = FinalStep(self.place, notify, self._timeout, self._stores)
        return self._final_step

    @property
    def _stores(self) -> object:
        """The stores that have to live as long as ranks may meet in them."""
        return (self._meeting.hosted, self._meeting.training) if self._meeting is not None else None

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._closed

    def close(self) -> None:
        """Gather for no further save."""
        self._closed = True

    def leave(self) -> None:
        """Give up the store that this process has opened, if it has."""
        self._meeting = None

    def _check_open(self) -> None:
        if self._closed:
            raise ExecutorError("the executor is closed", hint="Make a new one")
