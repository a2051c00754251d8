"""The ranks that an executor serves: where they meet, and their answers to a call that all make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from cloudckpt.backends.errors import ConfigurationError, ExecutorError
from cloudckpt.executor import outcomes
from cloudckpt.executor.council import Council, SoloCouncil
from cloudckpt.executor.last_call import Heard, LastCall
from cloudckpt.executor.meeting import Contact, Meeting
from cloudckpt.executor.network.network_options import NetworkOptions
from cloudckpt.executor.rendezvous import MeetingPlace, grouped, tcp_store_of_training
from cloudckpt.executor.roll_call import Call, RollCall
from cloudckpt.executor.store_council import StoreCouncil


class Gathering:
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
        self._meeting: Meeting | None = None
        self._roll: RollCall | None = None
        self._last_call: LastCall | None = None
        self._contact: Contact | None = None
        """What came of meeting in the place that is known; None where the ranks have met."""
        self._closed = False
        self.place: MeetingPlace | None = None
        self.council: Council = SoloCouncil()

    @property
    def rank(self) -> int:
        """This process's rank; 0 for a single process, and before the ranks have met."""
        return self.place.rank if self.place is not None else 0

    def gather(self, process_group: dist.ProcessGroup | None, no_dist: bool, call: str) -> None:
        """Agree with the other ranks where to meet, at the first call and after one that failed.

        Args:
            process_group: the ranks; None for all of them.
            no_dist: this process alone is meant.
            call: made by this rank, as an error names it.

        Raises:
            ConfigurationError: an earlier call named another group.
            ExecutorError: the executor is closed, rank 0 did not come within the time, or this rank can't
                reach the store.
        """
        self._check_open()
        if self._served is not None:
            if self._served != (process_group, no_dist):
                raise ConfigurationError(
                    "an executor serves one process group, and this call names another than the first",
                    hint="Make an executor for each",
                )
            if self._contact is None:
                return
        if self._meeting is not None or (
            not no_dist and grouped() and dist.get_world_size(process_group) > 1
        ):
            with self.meeting():
                self._meet(process_group, call)
        self._served = (process_group, no_dist)

    def _meet(self, process_group: dist.ProcessGroup | None, call: str) -> None:
        contact, self._contact = self._contact, None
        if self._meeting is None:
            self._meeting = Meeting(process_group, self._use_prefix_store, self._network)
        place = self._meeting.place(self._timeout, call, contact or "none")
        if self.place is not None and place.prefix == self.place.prefix:
            return
        self.place = place
        self.council = StoreCouncil(place, self._meeting.address_now)
        self._roll = RollCall(place)
        if self._last_call is not None:
            self._last_call.move(place, self._meeting.hosted)

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

    def follow_first(self, call: Call, value: bool) -> bool:
        """Return rank 0's value, on every rank. All ranks call it, in the same order with all other calls.

        Raises:
            ExecutorError: rank 0 did not come within the time.
        """
        self._check_open()
        if self._roll is None:
            return value
        with self.meeting():
            return self._roll.follow_first(call, value, self._timeout)

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
            return outcomes.confer(self._roll, call, ask, self.rank, self._timeout)

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
                outcomes.meet(self._roll, call, self.rank, self._timeout)

    def last_call(self, heard: Heard) -> LastCall:
        """Return what agrees with the other ranks on the last of the calls that their trainers make.

        Every rank calls it once, and in the same order with all other calls.
        """
        self._check_open()
        server = self._meeting.hosted if self._meeting is not None else None
        self._last_call = LastCall(self.place, heard, self._timeout, server)
        return self._last_call

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
