"""Failures on their way between processes: the original error, with a note that names its rank."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Any, Final, TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.backends import tracebacks
from cloudckpt.backends.errors import CheckpointError, ExecutorError, note_others

ANY = (Exception, CheckpointException)
"""What a save may raise, to be caught: DCP's own exception is not an ``Exception``."""

E = TypeVar("E", bound=BaseException)


def original(error: BaseException, own_rank: int, *, with_frames: bool = True) -> BaseException:
    """Return what the lowest failing rank raised, with a note that names the rank.

    DCP wraps whatever fails on any rank in a ``CheckpointException`` that it raises on all of them. That rank
    itself also gets notes of the other ranks' failures and, ``with_frames``, of its caller's code.
    """
    if not isinstance(error, CheckpointException) or not error.failures:
        return noted(error)
    failures = sorted(error.failures.items())
    (rank, (first, frames)), others = failures[0], failures[1:]
    own = rank == own_rank
    if not _names_rank(first):
        named = first.rank if isinstance(first, CheckpointError) and first.rank is not None else rank
        first.add_note(_raised_on(named, tracebacks.shown(first, frames) if own and with_frames else ""))
    if own:
        note_others(first, {other: failure for other, (failure, _) in others})
    return original(first, own_rank) if isinstance(first, CheckpointException) else first


def noted(error: E) -> E:
    """Note the frames of the caller on an error: a note survives pickling, a traceback does not."""
    if frames := tracebacks.shown(error):
        error.add_note(frames)
    return error


def own_or_common(own: bytes | None, common: bytes) -> BaseException:
    """Return the error that all ranks share, as this rank pickled it where it is its own: with its notes."""
    error = loads(common)
    mine = loads(own) if own is not None else error
    return mine if _alike(mine, error) else error


def shared(error: BaseException, rank: int) -> BaseException:
    """Return an error of this rank as every rank raises it, with a note that names the rank.

    That is the error itself where it pickles, and else what `dumps` makes of it. An interruption, such as
    Ctrl-C or ``SystemExit``, is this rank's own: the others raise an ``ExecutorError`` that names it.
    """
    if not isinstance(error, ANY):
        common: BaseException = ExecutorError(
            f"rank {rank} was interrupted by {type(error).__name__}",
            rank=rank,
            hint="The call failed on every rank; make it again if the job goes on",
        )
        common.__cause__ = error
    elif _whole(error) is not None:
        common = error
    else:
        common = loads(dumps(error))
        common.__cause__ = error
    if isinstance(common, CheckpointError):
        common.located(rank=rank)
    if not _names_rank(common):
        common.add_note(_raised_on(rank))
    return common


def with_traceback_of(own: BaseException | None, common: BaseException) -> BaseException:
    """Return what to raise where this rank failed with ``own`` and all ranks share ``common``.

    That is the common error. Where it is this rank's own, it still has the frames of the caller's code.
    """
    if own is None:
        return common
    if _alike(own, common):
        own.__notes__ = list(_notes(common))  # the other ranks' failures may be among them
        return tracebacks.trimmed(own)
    common.__context__ = own
    return common


def dumps(error: BaseException) -> bytes:
    """Pickle an error with its notes.

    Where its own way of pickling loses its class or text, as that of a class whose constructor takes two
    arguments and hands on one, it is made again without its constructor. One that doesn't pickle at all is
    replaced by a CheckpointError with its class and text.
    """
    whole = _whole(error)
    if whole is not None:
        return whole
    return pickle.dumps((CheckpointError(f"{type(error).__name__}: {_text(error)}"), _notes(error)))


def loads(data: bytes) -> BaseException:
    """The error that `dumps` pickled, in a process of the same job."""
    try:
        error, notes = pickle.loads(data)  # noqa: S301 - from a process of this job
        str(error)
    except Exception as unreadable:  # noqa: BLE001 - a class that only the other process can import
        return CheckpointError(f"a failure could not be read here: {type(unreadable).__name__}: {unreadable}")
    if not isinstance(error, BaseException):
        return CheckpointError(f"no error but {error!r}")
    error.__notes__ = list(notes)
    return error


class _Remade:
    """Pickles as an error that is made without its class's constructor."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> Any:
        return _remade, (type(self._error), self._error.args, dict(self._error.__dict__))


def _remade(cls: type[E], args: Iterable[Any], fields: dict[str, Any]) -> E:
    error = cls.__new__(cls, *args)
    error.args = tuple(args)
    error.__dict__.update(fields)
    return error


def _whole(error: BaseException) -> bytes | None:
    """The pickled error, where it survives that."""
    for form in (error, _Remade(error)):
        data = _pickled(form, _notes(error))
        if data is not None and _alike(loads(data), error):
            return data
    data = _pickled(
        error, _notes(error)
    )  # its text may hold the address of an object, which is another there
    return data if data is not None and type(loads(data)) is type(error) else None


def _notes(error: BaseException) -> tuple[str, ...]:
    return tuple(map(str, getattr(error, "__notes__", ())))


def _pickled(form: object, notes: tuple[str, ...]) -> bytes | None:
    try:
        return pickle.dumps((form, notes))
    except Exception:  # noqa: BLE001 - a class of the caller's own may fail in any way
        return None


def _alike(error: BaseException, other: BaseException) -> bool:
    return type(error) is type(other) and _text(error) == _text(other)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as failed:  # noqa: BLE001 - a class of the caller's own may fail in any way
        return f"its text could not be made: {type(failed).__name__}"


_RAISED_ON: Final = "raised on rank "


def _raised_on(rank: int, frames: str = "") -> str:
    return f"{_RAISED_ON}{rank}:\n{frames}" if frames else f"{_RAISED_ON}{rank}"


def _names_rank(error: BaseException) -> bool:
    return any(note.startswith(_RAISED_ON) for note in _notes(error))
