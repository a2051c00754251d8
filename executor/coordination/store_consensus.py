"""The consensus of a job with several ranks: it meets in the store that the job has."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

from torch.distributed import DistError, DistStoreError, Store

from cloudckpt.backends.errors import CheckpointError, ConfigurationError, ExecutorError
from cloudckpt.backends.system import system_limits
from cloudckpt.executor.coordination import call_comparison, remote_errors, wire_format
from cloudckpt.executor.coordination.consensus import (
    Address,
    Agreement,
    AttemptResult,
    Consensus,
    RankStatus,
    SaveAttempt,
)
from cloudckpt.executor.coordination.rendezvous import MeetingPlace, ProcessGroupInfo
from cloudckpt.executor.network import absence

_REPORT = 30.0
"""Seconds that a rank tries to tell the store how its save ended; without its word a new group is formed."""


class StoreConsensus(Consensus):
    """Ranks that meet in a store.

    Args:
        place: the store.
        address_now: returns the host and port of the store in which a new group of processes meets, on rank
            0; None for the same store.
    """

    def __init__(
        self, place: MeetingPlace, address_now: Callable[[], tuple[str, int] | None] = lambda: None
    ) -> None:
        self._place = place
        self._address_now = address_now
        self._next = 1
        self._ahead = 0  # calls that the others have had and this rank has not
        self._last: int | None = None

    def convene(self, status: RankStatus, timeout: float) -> SaveAttempt:
        status = replace(status, call=status.call + self._ahead)
        agreement, attempt = self._place.bounded("convene", lambda: self._join(status, timeout), timeout)
        self._next = attempt + 1
        if agreement.refusal is not None:
            raise remote_errors.loads(agreement.refusal)
        self._ahead += agreement.call - status.call
        self._last = attempt
        return _StoreAttempt(self._place, attempt, agreement.generation)

    def group(self, generation: int, timeout: float) -> tuple[ProcessGroupInfo, MeetingPlace | None]:
        key = f"{generation}/address"

        def agree() -> Address:
            store = self._place.connect("consensus", timeout)
            if self._place.rank == 0:
                try:
                    address = Address(self._address_now())
                except CheckpointError as error:
                    address = Address(failure=remote_errors.dumps(error))
                store.set(key, wire_format.text(address))
            store.wait([key], timedelta(seconds=timeout))
            return wire_format.message(store.get(key), Address, key)

        address = self._place.bounded("agree where their checkpoint processes meet", agree, timeout)
        if address.failure is not None:
            raise remote_errors.loads(address.failure)
        place = self._place.read_again(address.at)
        return place.info, place

    def leave(self, timeout: float) -> None:
        last = self._last
        if self._place.rank != 0 or last is None:
            return

        def wait() -> None:
            store = self._place.connect("consensus", timeout)
            if store.check([f"{last}/result"]):
                store.wait([f"{last}/seen"], timedelta(seconds=timeout))

        try:
            self._place.bounded("leave", wait, timeout)
        except ExecutorError:
            return  # a rank that has not seen it is gone

    def _join(self, status: RankStatus, timeout: float) -> tuple[Agreement, int]:
        """Return the attempt's agreement and number, of any rank."""
        deadline = time.monotonic() + timeout
        # Half of the time: the others wait as long, and must learn why this rank does not join.
        store = self._place.connect("consensus", timeout / 2)
        absence.withdraw(self._place.group, self._place.rank)
        attempt = self._next
        while True:
            while store.check([f"{attempt}/agreement"]):
                attempt += 1  # it began or was given up without this rank
            store.set(f"{attempt}/status/{self._place.rank}", wire_format.text(status))
            self._forget(store, attempt - 2)
            # A rank counts once, also when a try of its own that was given up comes back to life.
            first = store.add(f"{attempt}/came/{self._place.rank}", 1) == 1
            if first and store.add(f"{attempt}/joined", 1) == self._place.world_size:
                _write_once(store, f"{attempt}/agreement", self._presided(store, attempt))
            try:
                remaining = max(0.001, deadline - time.monotonic())
                store.wait([f"{attempt}/agreement"], timedelta(seconds=remaining))
            except DistStoreError:
                given_up = self._given_up(store, attempt, status, timeout)
                _write_once(store, f"{attempt}/agreement", given_up)
            key = f"{attempt}/agreement"
            agreement = wire_format.message(store.get(key), Agreement, key)
            if agreement.rejoin != status.call:
                return agreement, attempt
            attempt += 1

    def _presided(self, store: Store, attempt: int) -> Agreement:
        """Return the agreement that follows from the status of every rank."""
        standings = self._standings(store, attempt)
        for status in standings.values():
            if status.failure is not None:
                return Agreement(attempt, refusal=status.failure)
        call = max(status.call for status in standings.values())
        behind = [rank for rank, status in standings.items() if status.call < call]
        subjects = {status.subject for status in standings.values()}
        if behind and len(subjects) > 1:
            refusal = ExecutorError(
                f"rank {behind[0]} is behind: it comes to {standings[behind[0]].subject}, "
                "and other ranks have gone on to the next save",
                rank=behind[0],
                hint="Every rank must save at the same steps",
            )
            return Agreement(attempt, refusal=remote_errors.dumps(refusal), rejoin=call)
        if len(subjects) > 1 and all(status.together for status in standings.values()):
            return Agreement(attempt, refusal=remote_errors.dumps(_different(standings)))
        generations = {status.generation for status in standings.values()}
        (alive,) = generations if len(generations) == 1 else (None,)
        return Agreement(alive if alive is not None else attempt, call=call)

    def _given_up(self, store: Store, attempt: int, status: RankStatus, timeout: float) -> Agreement:
        missing = [
            rank for rank in range(self._place.world_size) if not store.check([f"{attempt}/status/{rank}"])
        ]
        refusal = call_comparison.missing(self._place, missing, status.subject or "this save", timeout)
        return Agreement(attempt, refusal=remote_errors.dumps(refusal))

    def _standings(self, store: Store, attempt: int) -> dict[int, RankStatus]:
        keys = [f"{attempt}/status/{rank}" for rank in range(self._place.world_size)]
        values = store.multi_get(keys)
        return {
            rank: wire_format.message(value, RankStatus, key)
            for rank, (key, value) in enumerate(zip(keys, values, strict=True))
        }

    def _forget(self, store: Store, attempt: int) -> None:
        """Drop keys that no rank reads any more. Agreements stay: a late rank goes on by them."""
        for name in ("status", "came"):
            store.delete_key(f"{attempt}/{name}/{self._place.rank}")
        if self._place.rank == 0:
            for name in ("joined", "failure", "reported"):
                store.delete_key(f"{attempt}/{name}")


class _StoreAttempt(SaveAttempt):
    def __init__(self, place: MeetingPlace, attempt: int, generation: int) -> None:
        super().__init__(attempt, generation)
        self._place = place
        self._result: AttemptResult | None = None
        self._lost: str | None = None
        self._wake: Callable[[], None] = lambda: None

    @property
    def result(self) -> AttemptResult | None:
        return self._result

    @property
    def lost(self) -> str | None:
        return self._lost

    def watch(self, wake: Callable[[], None], timeout: float) -> None:
        self._wake = wake
        system_limits.start(
            threading.Thread(
                target=self._listen, args=(timeout,), name=f"cloudckpt-result-{self.attempt}", daemon=True
            )
        )

    def report(self, failure: bytes | None, *, sound: bool) -> None:
        thread = threading.Thread(
            target=self._tell, args=(failure, sound), name=f"cloudckpt-report-{self.attempt}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no thread can be started
            self._tell(failure, sound)

    def _listen(self, timeout: float) -> None:
        key = f"{self.attempt}/result"
        try:
            store = self._place.connect("consensus", timeout)
            store.wait([key], timedelta(seconds=timeout))
            self._result = wire_format.message(store.get(key), AttemptResult, key)
            if store.add(f"{self.attempt}/seen-by", 1) == self._place.world_size:
                store.set(f"{self.attempt}/seen", "1")
        except (DistError, CheckpointError) as error:
            if self._result is None:
                self._lost = f"{type(error).__name__}: {error}"
        self._wake()

    def _tell(self, failure: bytes | None, sound: bool) -> None:
        try:
            store = self._place.connect("consensus", _REPORT)
            if not sound:
                _write_once(store, f"{self.attempt}/result", AttemptResult(sound=False, failure=failure))
                return
            if failure is not None:
                _write_once(store, f"{self.attempt}/failure", AttemptResult(sound=True, failure=failure))
            if store.add(f"{self.attempt}/reported", 1) == self._place.world_size:
                first = f"{self.attempt}/failure"
                found = AttemptResult(sound=True)
                if store.check([first]):
                    found = wire_format.message(store.get(first), AttemptResult, first)
                _write_once(store, f"{self.attempt}/result", found)
        except (DistError, CheckpointError) as error:
            self._lost = f"{type(error).__name__}: {error}"
            self._wake()


def _different(standings: dict[int, RankStatus]) -> ConfigurationError:
    subjects = {rank: f"to {status.subject or 'a save'}" for rank, status in standings.items()}
    rank, described = call_comparison.compared(subjects, "comes", "come")
    return ConfigurationError(
        f"the ranks save differently: {described}",
        uri="",  # none is the same on all ranks, and the error is
        rank=rank,
        hint="Every rank must save the same steps to the same URI; the next save tries again",
    )


def _write_once(store: Store, key: str, message: Agreement | AttemptResult) -> None:
    store.compare_set(key, "", wire_format.text(message))
