"""Agreement on the last call of a training loop, the same on every rank when one of them is preempted.

All ranks make the same calls, though not at the same moment, and none may wait for another in one of them:
that other may be in a collective, waiting for it. So what is agreed on lies ahead of all. When a rank is
preempted, a thread of every rank says how many calls its trainer has started; the last call is the one
after the highest number. From saying its number until it knows that call, which takes no trainer's doing, a
rank lets no further call through. Without a notice a call costs a counter.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

from torch.distributed import Store

from cloudckpt.backends.errors import ExecutorError
from cloudckpt.backends.system import background_log, system_limits
from cloudckpt.executor.coordination.rendezvous import MeetingPlace
from cloudckpt.executor.network.agreement import leave_last

_log = background_log.logger(__name__)

_LONG = timedelta(days=365)
"""How long a notice may fail to come: a run may take months."""
_CLOSING = 5.0
"""Seconds that ending may take."""
_LEAVING = 3.0
"""Seconds that rank 0 waits for the other ranks to close."""
_CLOSED = "closed"
"""Message of a rank to itself, so that its thread ends."""

Notify = Callable[[str], object]
"""Called with the reason when this rank learns that the job is to end: once, on a thread of its own."""


class FinalStep:
    """The state of that agreement on one rank.

    Args:
        place: where the ranks meet; None in a single process.
        notify: called when a notice comes, of any rank.
        timeout: seconds that the store may take for an answer.
        server: the store, if this process has opened it: it serves until this object is closed.
    """

    def __init__(
        self, place: MeetingPlace | None, notify: Notify, timeout: float, server: object = None
    ) -> None:
        self._place = place
        self._server = server
        self._notify = notify
        self._timeout = timeout
        self._changed = threading.Condition()
        self._calls = 0
        self._noticed = False
        self._last: int | None = None
        self._undecidable = False
        self._closed = False
        self._teller: Future[Store] = Future()
        self._threads: list[threading.Thread] = []
        if place is not None:
            self._begin("cloudckpt-notice", lambda: self._listen(place))

    def give_notice(self, reason: str) -> None:
        """Have the job end at a call that all ranks have before them. From any thread; returns at once."""
        place = self._place
        if place is not None:
            self._tell([_told(rank) for rank in range(place.world_size)], reason)
        elif not self._noticed:
            self._decide(1 + self._learn(reason))

    def passes(self, patience: float) -> bool:
        """Count a call of the trainer's, and tell whether it may pass: False for the last, and those after.

        Between a notice and the agreement it waits, for at most ``patience`` seconds: without an agreement,
        as when another rank is gone, every call passes.
        """
        with self._changed:
            self._calls += 1
            if not self._noticed:
                return True
            self._changed.wait_for(lambda: self._last is not None or self._undecidable, patience)
            return self._last is None or self._calls < self._last

    def close(self) -> None:
        """Listen no longer. Waits for its threads, but not for a store that is cut off.

        One that came back from the store while the interpreter ends would take the process down with it.
        """
        self._closed = True
        if self._place is not None:
            self._tell([_told(self._place.rank)], _CLOSED)
        deadline = time.monotonic() + _CLOSING
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._place is not None and not self._noticed and not self._undecidable:
            self._leave(self._place)
        self._server = None

    def move(self, place: MeetingPlace, server: object = None) -> None:
        """Listen in another store, where the ranks meet from now on. A notice that has come stays."""
        with self._changed:
            if self._closed or self._noticed:
                return
            self._place, self._server = place, server
            self._teller, self._undecidable = Future(), False
        self._begin("cloudckpt-notice", lambda: self._listen(place))

    def _leave(self, place: MeetingPlace) -> None:
        def leave() -> None:
            with contextlib.suppress(RuntimeError):  # a rank closes later, or not at all
                leave_last(self._teller.result(_LEAVING), place.rank, place.world_size, _LEAVING)

        system_limits.try_for(_LEAVING, leave, "cloudckpt-leave")

    def _tell(self, keys: list[str], value: str) -> None:
        def tell() -> (
            None
        ):  # the store may be cut off and never answer, and who calls this can't wait for that
            try:
                store: Any = self._teller.result(self._timeout)  # torch's stub lacks multi_set
                store.multi_set(keys, [value] * len(keys))
            except RuntimeError as error:  # of a store, of any kind
                if value != _CLOSED:
                    _log.warning("the other ranks could not be notified: %s", error)
                self._give_up()

        self._begin("cloudckpt-notify", tell)

    def _begin(self, name: str, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, name=name, daemon=True)
        try:
            system_limits.start(thread)
        except ExecutorError as error:  # training goes on, and a notice does not reach this rank's last call
            _log.warning("this rank can't agree on a last step with others: %s", error)
            self._give_up()
        else:
            self._threads.append(thread)

    def _connect(self, place: MeetingPlace) -> None:
        try:
            self._teller.set_result(place.connect("notice", self._timeout))
        except RuntimeError as error:
            self._teller.set_exception(error)
            raise

    def _listen(self, place: MeetingPlace) -> None:
        try:
            # Two, for one that waits is taken. Both now: under load a store may be long in letting one in.
            self._connect(place)
            store = place.connect("notice", self._timeout)
            store.wait([_told(place.rank)], _LONG)
            reason = store.get(_told(place.rank)).decode()
            if reason != _CLOSED and not self._closed:
                self._agree(store, place, reason)
        except RuntimeError as error:  # the store went, with the process that had it
            log = _log.warning if self._noticed else _log.debug
            log("the ranks could not agree on the last step: %s", error)
            if place is self._place:
                self._give_up()

    def _agree(self, store: Store, place: MeetingPlace, reason: str) -> None:
        started = self._learn(reason)
        store.set(_started(place.rank), str(started))
        if store.add("joined", 1) == place.world_size:
            every = store.multi_get([_started(rank) for rank in range(place.world_size)])
            store.set("last", str(1 + max(map(int, every))))
        store.wait(["last"], timedelta(seconds=self._timeout))
        self._decide(int(store.get("last")))

    def _learn(self, reason: str) -> int:
        """Let no further call through, and return how many there were."""
        with self._changed:
            self._noticed = True
            started = self._calls
        self._notify(reason)
        return started

    def _decide(self, last: int) -> None:
        with self._changed:
            self._last = last
            self._changed.notify_all()

    def _give_up(self) -> None:
        with self._changed:
            self._undecidable = True
            self._changed.notify_all()


def _told(rank: int) -> str:
    return f"notice/{rank}"


def _started(rank: int) -> str:
    return f"started/{rank}"
