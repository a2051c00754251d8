"""Answers and outcomes that all ranks of a job must share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist

from cloudckpt.backends.errors import note_others
from cloudckpt.backends.system_limits import try_for
from cloudckpt.backends.tracebacks import trimmed, trimming
from cloudckpt.executor import failures
from cloudckpt.executor.rendezvous import grouped

_LAST_WORD = 10.0
"""Seconds that a rank that was interrupted tries to tell the others: they may have been so themselves."""

T = TypeVar("T")
R = TypeVar("R")


def own_rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank in the group; 0 in a single process."""
    return dist.get_rank(group) if grouped() else 0


def group_size(group: dist.ProcessGroup | None) -> int:
    """Return how many ranks the group has; 1 for a single process."""
    return dist.get_world_size(group) if grouped() else 1


@trimming
def agreed(ask: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Ask on the group's first rank, and return its answer, or raise its error, on every one.

    A collective: every rank calls it. Without ``torch.distributed`` it asks here.

    Raises:
        ExecutorError: the first rank was interrupted, which raises its own exception itself.
        BaseException: what ``ask`` raised, noted with the rank.
    """
    if not grouped():
        return ask()
    rank = dist.get_rank(group)
    own = _Outcome.of(ask, rank) if rank == 0 else None

    def tell() -> _Word:
        return _broadcast(own.word if own is not None else None, group)

    return cast("T", _settled(own, tell))


@trimming
def together(do: Callable[[], T], ask: Callable[[], R], group: dist.ProcessGroup | None) -> tuple[T, R]:
    """Do something on every rank, and raise what it raised on any of them on every one.

    A collective: every rank calls it. Without ``torch.distributed`` it does so here.

    Args:
        do: on every rank.
        ask: on the group's first rank, after ``do``.
        group: the ranks.

    Returns:
        What ``do`` returned on this rank, and what ``ask`` did on the first.

    Raises:
        ExecutorError: a rank was interrupted, which raises its own exception itself.
        BaseException: what the lowest failing rank raised, noted with the rank.
    """
    if not grouped():
        return do(), ask()
    rank = dist.get_rank(group)
    mine: list[T] = []

    def act() -> R | None:
        mine.append(do())
        return ask() if rank == 0 else None

    own = _Outcome.of(act, rank)

    def tell() -> _Word:
        every = gathered(own.word.failure, group)
        return _broadcast(_first(own.word, every) if every is not None else None, group)

    answer = _settled(own, tell)
    return mine[0], cast("R", answer)


def gathered(value: T, group: dist.ProcessGroup | None) -> list[T] | None:
    """Return the values of all ranks on the group's first rank, and None on the others. A collective."""
    if not grouped():
        return [value]
    first = dist.get_rank(group) == 0
    values: list[Any] | None = [None] * dist.get_world_size(group) if first else None
    dist.gather_object(value, values, group=group, group_dst=0)
    return values


@dataclass(frozen=True, slots=True)
class _Word:
    """The message to the other ranks: an answer, or a pickled error."""

    answer: Any = None
    failure: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Outcome(Generic[T]):
    """The outcome of a call on this rank: ``raised`` is the exception that this rank itself raises."""

    word: _Word
    raised: BaseException | None = None

    @classmethod
    def of(cls, call: Callable[[], T], rank: int) -> _Outcome[T]:
        try:
            return cls(_Word(call()))
        except BaseException as error:  # noqa: BLE001 - every rank raises it
            common = failures.shared(error, rank)
            raised = common if isinstance(error, failures.ANY) else error
            return cls(_Word(failure=failures.dumps(common)), raised)

    @property
    def interrupted(self) -> bool:
        return self.raised is not None and not isinstance(self.raised, failures.ANY)


def _settled(own: _Outcome[Any] | None, tell: Callable[[], _Word]) -> Any:
    """Tell the others, and return or raise what all ranks do."""
    if own is None or own.raised is None:
        word = tell()
        if word.failure is not None:
            raise failures.loads(word.failure)
        return word.answer
    if own.interrupted:
        _within(_LAST_WORD, tell)
        raise own.raised
    try:
        word = tell()
    except Exception as lost:  # noqa: BLE001 - this rank's own failure is the one to be raised
        own.raised.add_note(f"the other ranks could not be notified: {type(lost).__name__}: {lost}")
        raise trimmed(own.raised) from own.raised.__cause__
    common = (
        own.raised
        if word.failure is None
        else failures.with_traceback_of(own.raised, failures.loads(word.failure))
    )
    raise common from common.__cause__


def _first(own: _Word, every: list[bytes | None]) -> _Word:
    """The lowest failing rank's error, with the others' as notes, or else the first rank's answer."""
    failed = {rank: data for rank, data in enumerate(every) if data is not None}
    if not failed:
        return own
    rank, *others = sorted(failed)
    if not others:
        return _Word(failure=failed[rank])
    error = failures.loads(failed[rank])
    note_others(error, {other: failures.loads(failed[other]) for other in others})
    return _Word(failure=failures.dumps(error))


def _broadcast(word: _Word | None, group: dist.ProcessGroup | None) -> _Word:
    box: list[Any] = [word]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return cast("_Word", box[0])


def _within(seconds: float, tell: Callable[[], object]) -> None:
    """Try for so long: a collective that the others never come to can't be interrupted otherwise."""
    initialized: Callable[[], bool] = torch.cuda.is_initialized
    device = torch.cuda.current_device() if initialized() else None

    def run() -> None:
        if device is not None:
            torch.cuda.set_device(device)  # a thread begins with the first
        try:
            tell()
        except Exception:  # noqa: BLE001 - this rank raises what interrupted it
            return

    try_for(seconds, run, "cloudckpt-last-word")
