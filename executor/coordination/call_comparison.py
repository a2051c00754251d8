"""Calls that the ranks of an executor must make alike, compared in the store in which they meet.

Ranks meet in *rounds*. Each posts its call, the last one to come compares all of them, and its word ends the
round for everybody: all calls are alike, or they are refused. A rank that waited in vain ends the round as
well. Words are written once, by compare-and-set. A rank that comes to a round which ended without it goes on
to the next one, so that ranks that have made different numbers of calls meet again.

A round takes a rank eight requests, and the last one to come two more.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Literal

from torch.distributed import DistError, DistStoreError, Store

from cloudckpt.backends.errors import ConfigurationError, ExecutorError
from cloudckpt.executor.coordination import remote_errors, wire_format
from cloudckpt.executor.coordination.rendezvous import MeetingPlace, unreached
from cloudckpt.executor.network import absence

_FRESH: Final = 60.0
"""Seconds for which an idle connection is used again: later, a firewall may have forgotten it."""
_NAMED: Final = 8
"""Ranks, and different calls, that an error names."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call as one rank makes it.

    Attributes:
        name: with its arguments, such as ``pin(5)``.
        uri: the run that it is about.
        about: tells several questions of one call apart.
    """

    name: str
    uri: str | None = None
    about: str = ""


@dataclass(frozen=True, slots=True)
class _Word:
    """The end of a round: ``said`` is a rank's word, or the record of a refusal's error."""

    kind: Literal["alike", "said", "refused"]
    call: Call
    rank: int
    said: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Posted:
    """A rank's call in a round, and when it was posted: a rank may post the same call again."""

    call: Call
    at: int


@dataclass(frozen=True, slots=True)
class _Followed:
    """The value that rank 0 gives in a call."""

    call: Call
    value: bool


class CallComparison:
    """The rounds of one executor's ranks, on one of them."""

    def __init__(self, place: MeetingPlace) -> None:
        self._place = place
        self._joined = 0
        self._seen = 0
        """Rounds whose end this rank knows."""
        self._topic = 1
        self._idle: tuple[Store, float] | None = None
        """A connection that no thread uses, and when one did."""

    def confer(self, call: Call, said: bytes | None, timeout: float) -> bytes | None:
        """Meet the other ranks in a call, and return None once all have come to it.

        Where a rank has something to say, its word ends the round, and is returned on each.

        Raises:
            ConfigurationError: the ranks make different calls.
            ExecutorError: a rank did not come within ``timeout`` seconds, or the store can't be reached.
        """
        first, until = self._seen + 1, time.monotonic() + timeout

        def meet() -> _Word:
            # Half of the time: the others wait as long, and must learn why this rank does not come.
            store = self._connected(timeout / 2)
            absence.withdraw(self._place.group, self._place.rank)
            number = first
            self._joined = first
            try:
                while (word := _ended(store, number)) is not None:
                    if word.kind != "refused" and word.call == call:
                        break  # this rank has posted its call before, or another one has had its say
                    self._hear(store, number)
                    number = self._joined = number + 1
                else:
                    self._join(store, number, call, said)
                    word = self._awaited(store, number, call, until, timeout)
            except ExecutorError:  # what ends the round is no word of a rank's: the next call passes it
                self._seen = number
                raise
            self._hear(store, number)
            self._idle = store, time.monotonic()
            return word

        word = self._place.bounded(f"meet in {call.name}", meet, timeout)
        if word.kind == "refused" and word.said is not None:
            raise remote_errors.loads(word.said)
        if word.call != call:
            raise different({word.rank: word.call, self._place.rank: call})
        return word.said

    def refuse(self, call: Call, failure: bytes, timeout: float) -> None:
        """End the round that this rank is in with the record of an error, unless it has ended.

        Raises:
            ExecutorError: the store can't be reached.
        """
        number, word = self._joined, _Word("refused", call, self._place.rank, failure)

        def write() -> None:
            if number > self._seen:
                _write_once(self._place.connect("calls", timeout), f"{number}/word", word)

        self._place.bounded(f"meet in {call.name}", write, timeout)

    def broadcast_bool(self, call: Call, value: bool, timeout: float) -> bool:
        """Return the value that rank 0 gives in this call. Rank 0 does not wait for the others.

        A rank that is behind rank 0 goes on to what rank 0 said last, or in this call. One whose call differs
        from rank 0's follows it all the same: its effect is compared elsewhere.

        Raises:
            ExecutorError: rank 0 did not come within ``timeout`` seconds, or the store can't be reached.
        """
        first = self._topic

        def ask() -> tuple[bool, int]:
            store = self._connected(timeout)
            if self._place.rank == 0:
                store.set(_followed(first), wire_format.text(_Followed(call, value)))
                found = value, first
            else:
                found = self._read(store, first, call, timeout)
            self._idle = store, time.monotonic()
            return found

        followed, topic = self._place.bounded(f"meet in {call.name}", ask, timeout)
        self._topic = topic + 1
        return followed

    def _connected(self, timeout: float) -> Store:
        """Return a connection for one call, whose thread may never come back from the store."""
        idle, self._idle = self._idle, None
        if idle is not None and time.monotonic() - idle[1] < _FRESH:
            return idle[0]
        return self._place.connect("calls", timeout)

    def _read(self, store: Store, topic: int, call: Call, timeout: float) -> tuple[bool, int]:
        """Return rank 0's value in this call, or else its last one, and the topic's number."""
        try:
            store.wait([_followed(topic)], timedelta(seconds=timeout))
        except DistStoreError as error:
            raise missing(self._place, [0], call.name, timeout) from error
        while True:
            self._topic = topic + 1  # where nothing can be read, the next call goes on
            followed = wire_format.message(store.get(_followed(topic)), _Followed, _followed(topic))
            if store.add(f"{_followed(topic)}/seen-by", 1) == self._place.world_size - 1:
                store.delete_key(_followed(topic))
                store.delete_key(f"{_followed(topic)}/seen-by")
            if followed.call == call or not store.check([_followed(topic + 1)]):
                return followed.value, topic
            topic += 1

    def _join(self, store: Store, number: int, call: Call, said: bytes | None) -> None:
        """Post this rank's call in a round, and end the round if that is what it takes."""
        own, word = _posted(number, self._place.rank), f"{number}/word"
        posted = wire_format.text(_Posted(call, time.monotonic_ns()))
        # A try of this rank's that was cut off has counted it.
        counted = store.compare_set(own, "", posted) != posted.encode()
        if counted:
            store.set(own, posted)
        if said is not None:
            _write_once(store, word, _Word("said", call, self._place.rank, said))
        last = not counted and store.add(f"{number}/came", 1) == self._place.world_size
        if last and not store.check([word]):
            _write_once(store, word, self._compared(store, number, call))

    def _awaited(self, store: Store, number: int, call: Call, until: float, timeout: float) -> _Word:
        """Return the word that ends a round, which is this rank's where it has waited in vain."""
        word = f"{number}/word"
        try:
            store.wait([word], timedelta(seconds=max(0.001, until - time.monotonic())))
        except DistStoreError:
            every = range(self._place.world_size)
            away = [one for one in every if not store.check([_posted(number, one)])]
            late = remote_errors.dumps(missing(self._place, away, call.name, timeout))
            _write_once(store, word, _Word("refused", call, self._place.rank, late))
        return wire_format.message(store.get(word), _Word, word)

    def _compared(self, store: Store, number: int, call: Call) -> _Word:
        keys = [_posted(number, rank) for rank in range(self._place.world_size)]
        calls = {
            rank: wire_format.message(posted, _Posted, key).call
            for rank, (key, posted) in enumerate(zip(keys, store.multi_get(keys), strict=True))
        }
        if set(calls.values()) == {call}:
            return _Word("alike", call, self._place.rank)
        return _Word("refused", call, self._place.rank, remote_errors.dumps(different(calls)))

    def _hear(self, store: Store, number: int) -> None:
        """Count this rank among those that know the end of a round, and drop keys that no rank reads now."""
        if number <= self._seen:
            return
        self._seen = number
        with contextlib.suppress(DistError):  # a store that is gone keeps nothing, and the word is known
            # Not this round's, which the last one to come may be reading.
            store.delete_key(_posted(number - 1, self._place.rank))
            if store.add(f"{number}/seen-by", 1) == self._place.world_size:
                for name in ("word", "came", "seen-by"):
                    store.delete_key(f"{number}/{name}")


def missing(place: MeetingPlace, ranks: Sequence[int], what: str, timeout: float) -> ExecutorError:
    """Return the error for ranks that did not come to a call, with the reason if one has reported it."""
    for rank, reason in absence.reasons(place.group, ranks[:_NAMED]).items():
        return unreached(
            f"rank {rank} did not come to {what} within start_timeout ({timeout:g} s): {reason}",
            rank=rank,
            hint="Open the port of the store between the hosts for connections made while the job runs",
        )
    if not ranks:
        return ExecutorError(
            f"the ranks did not all come to {what} within start_timeout ({timeout:g} s)",
            hint="Raise start_timeout if some ranks come later; the next call tries again",
        )
    return ExecutorError(
        f"rank {named(ranks)} did not come to {what} within start_timeout ({timeout:g} s)",
        rank=ranks[0],
        hint="Every rank must make this call; raise start_timeout if some come later. "
        "The next call tries again",
    )


def different(calls: dict[int, Call]) -> ConfigurationError:
    """Return the error for ranks that make different calls, by rank."""
    uris = {call.uri for call in calls.values()}
    one = len(uris) == 1
    names = {rank: call.name if one else f"{call.name} of {call.uri}" for rank, call in calls.items()}
    differing, described = compared(names, "calls", "call")
    return ConfigurationError(
        f"the ranks make different calls: {described}",
        uri=next(iter(uris)) if one else None,
        rank=differing,
        hint="Every rank must make the same calls, with the same arguments"
        f"{'' if one else ', and make Checkpointers of the same URIs in the same order'}",
    )


def compared(names: dict[int, str], verb: str, verb_of_several: str) -> tuple[int, str]:
    """Return the first rank that does not do as rank 0, and what each of them does, in words."""
    ranks_of: defaultdict[str, list[int]] = defaultdict(list)
    for rank, name in sorted(names.items()):
        ranks_of[name].append(rank)
    (usual, first), *others = ranks_of.items()
    shown = [
        f"rank {named(ranks)} {verb if len(ranks) == 1 else verb_of_several} {name}"
        for name, ranks in others[:_NAMED]
    ]
    if len(others) > _NAMED:
        shown.append(f"{len(others) - _NAMED} more do otherwise")
    return others[0][1][0], f"{', '.join(shown)}, and rank {named(first)} {usual}"


def named(ranks: Sequence[int]) -> str:
    """Name ranks, but not thousands."""
    return ", ".join(map(str, ranks[:_NAMED])) + (", …" if len(ranks) > _NAMED else "")


def _followed(topic: int) -> str:
    return f"followed/{topic}"


def _posted(number: int, rank: int) -> str:
    return f"{number}/call/{rank}"


def _ended(store: Store, number: int) -> _Word | None:
    key = f"{number}/word"
    return wire_format.message(store.get(key), _Word, key) if store.check([key]) else None


def _write_once(store: Store, key: str, word: _Word) -> None:
    store.compare_set(key, "", wire_format.text(word))
