"""Answers and outcomes that all ranks of a job must share.

They travel as JSON or as the bytes that they are, and never as pickles.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from cloudckpt.backends.errors import note_others
from cloudckpt.backends.system.system_limits import try_for
from cloudckpt.backends.system.tracebacks import trimmed, trimming
from cloudckpt.executor.coordination import collectives, remote_errors, wire_format
from cloudckpt.executor.coordination.rendezvous import grouped

_LAST_WORD = 10.0
"""Seconds that a rank that was interrupted tries to tell the others: they may have been so themselves."""

T = TypeVar("T")
R = TypeVar("R")

_FAILURE, _BYTES, _JSON = b"f", b"b", b"j"
"""First byte of a message: what the rest of it is."""


def own_rank(group: dist.ProcessGroup | None) -> int:
    """Return this process's rank in the group; 0 in a single process."""
    return dist.get_rank(group) if grouped() else 0


def group_size(group: dist.ProcessGroup | None) -> int:
    """Return how many ranks the group has; 1 for a single process."""
    return dist.get_world_size(group) if grouped() else 1


@trimming
def agreed(ask: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Ask on the group's first rank, and return its answer, or raise its error, on every one.

    A collective: every rank calls it. Without ``torch.distributed`` it asks here.

    Args:
        ask: returns bytes, or what JSON holds: None, numbers, text, lists.
        group: the ranks.

    Raises:
        ExecutorError: the first rank was interrupted, which raises its own exception itself.
        BaseException: what ``ask`` raised, noted with the rank.
    """
    if not grouped():
        return ask()
    rank = dist.get_rank(group)
    own = _Outcome.of(ask, rank) if rank == 0 else None

    def tell() -> bytes:
        return collectives.broadcast(own.message if own is not None else b"", group)

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

    def tell() -> bytes:
        every = collectives.gather(own.message if own.raised is not None else b"", group)
        return collectives.broadcast(_first(own.message, every) if every is not None else b"", group)

    answer = _settled(own, tell)
    return mine[0], cast("R", answer)


def gathered(value: T, group: dist.ProcessGroup | None) -> list[T] | None:
    """Return the values of all ranks on the group's first rank, and None on the others. A collective.

    Args:
        value: bytes, or what JSON holds.
        group: the ranks.

    Raises:
        ExecutorError: another rank sent something else.
    """
    if not grouped():
        return [value]
    every = collectives.gather(_message(value), group)
    return None if every is None else [_answer(data, rank) for rank, data in enumerate(every)]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The outcome of a call on this rank: ``raised`` is the exception that this rank itself raises."""

    message: bytes
    """The message to the other ranks: the answer, or the record of an error."""
    raised: BaseException | None = None

    @classmethod
    def of(cls, call: Callable[[], Any], rank: int) -> _Outcome:
        try:
            return cls(_message(call()))
        except BaseException as error:  # noqa: BLE001 - every rank raises it
            common = remote_errors.shared(error, rank)
            raised = common if isinstance(error, remote_errors.ANY) else error
            return cls(_FAILURE + remote_errors.dumps(common), raised)

    @property
    def interrupted(self) -> bool:
        return self.raised is not None and not isinstance(self.raised, remote_errors.ANY)


def _settled(own: _Outcome | None, tell: Callable[[], bytes]) -> Any:
    """Tell the others, and return or raise what all ranks do."""
    if own is None or own.raised is None:
        message = tell()
        if (failure := _failure(message)) is not None:
            raise remote_errors.loads(failure)
        return _answer(message, 0)
    if own.interrupted:
        _within(_LAST_WORD, tell)
        raise own.raised
    try:
        failure = _failure(tell())
    except Exception as lost:  # noqa: BLE001 - this rank's own failure is the one to be raised
        own.raised.add_note(f"the other ranks could not be notified: {type(lost).__name__}: {lost}")
        raise trimmed(own.raised) from own.raised.__cause__
    common = (
        own.raised
        if failure is None
        else remote_errors.with_traceback_of(own.raised, remote_errors.loads(failure))
    )
    raise common from common.__cause__


def _first(own: bytes, every: list[bytes]) -> bytes:
    """Return the lowest failing rank's error, with the others' as notes, or else the first rank's answer.

    Args:
        own: the first rank's message.
        every: of each rank, the message of its error; empty where it has none.
    """
    failed = {rank: data.removeprefix(_FAILURE) for rank, data in enumerate(every) if data}
    if not failed:
        return own
    rank, *others = sorted(failed)
    if not others:
        return _FAILURE + failed[rank]
    error = remote_errors.loads(failed[rank])
    note_others(error, {other: remote_errors.loads(failed[other]) for other in others})
    return _FAILURE + remote_errors.dumps(error)


def _message(answer: Any) -> bytes:
    if isinstance(answer, bytes):
        return _BYTES + answer
    return _JSON + json.dumps(answer).encode()


def _failure(message: bytes) -> bytes | None:
    return message.removeprefix(_FAILURE) if message.startswith(_FAILURE) else None


def _answer(message: bytes, rank: int) -> Any:
    """Return the answer of a message.

    Raises:
        ExecutorError: it is none.
    """
    if message.startswith(_BYTES):
        return message.removeprefix(_BYTES)
    try:
        return json.loads(message.removeprefix(_JSON))
    except (ValueError, RecursionError) as error:
        raise wire_format.foreign(f"what rank {rank} sent", "is no answer") from error


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
