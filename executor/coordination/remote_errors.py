"""Failures on their way between processes: the original error, with a note that names its rank."""

from __future__ import annotations

from typing import Final, TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.backends.errors import CheckpointError, ExecutorError, note_others
from cloudckpt.backends.system import tracebacks
from cloudckpt.backends.system.printable import one_line
from cloudckpt.executor.coordination import error_records

ANY = (Exception, CheckpointException)
"""What a save may raise, to be caught: DCP's own exception is not an ``Exception``."""

E = TypeVar("E", bound=BaseException)


def original(error: BaseException, own_rank: int, *, with_frames: bool = True) -> BaseException:
    """Return what the lowest failing rank raised, with a note that names the rank.

    DCP wraps each failure on any rank in a ``CheckpointException`` that it raises on all of them. That rank
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
    """Return the record of an error with its notes.

    Where a record can't hold all of it, as it holds an open file, or its class is that of a function, the
    record is of a CheckpointError with its class and text.
    """
    whole = _whole(error)
    if whole is not None:
        return whole
    return error_records.packed(CheckpointError(f"{type(error).__name__}: {_text(error)}"), _notes(error))


def loads(data: bytes) -> BaseException:
    """Return the error that `dumps` recorded, in a process of the same job. Nothing that it says is run."""
    try:
        error, notes = error_records.unpacked(data)
        str(error)
    except Exception as unreadable:  # noqa: BLE001 - a foreign record is no more than unreadable
        return CheckpointError(
            f"a failure could not be read here: {type(unreadable).__name__}: {one_line(unreadable)[:500]}"
        )
    error.__notes__ = list(notes)
    return error


def _whole(error: BaseException) -> bytes | None:
    """Return the record of an error, where it can be made again from that."""
    try:
        data = error_records.packed(error, _notes(error))
    except Exception:  # noqa: BLE001 - a class of the caller's own may fail in any way
        return None
    again = loads(data)
    # Its text may hold the address of an object, which is another there.
    return data if _alike(again, error) or type(again) is type(error) else None


def _notes(error: BaseException) -> tuple[str, ...]:
    return tuple(map(str, getattr(error, "__notes__", ())))


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
