"""Failures on their way between processes: the original error, whole, with word of where it came from."""

from __future__ import annotations

import pickle
import traceback
from typing import TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.backends.errors import CheckpointError
from cloudckpt.backends.printable import one_line

ANY = (Exception, CheckpointException)
"""What a save may raise, to be caught: DCP's own exception is not an ``Exception``."""

E = TypeVar("E", bound=BaseException)


def original(error: BaseException) -> BaseException:
    """What the lowest failing rank raised, with the other ranks' failures and its traceback as notes.

    DCP wraps whatever fails on any rank in a ``CheckpointException`` that it raises on all of them.
    """
    if not isinstance(error, CheckpointException) or not error.failures:
        return noted(error)
    failures = sorted(error.failures.items())
    (rank, (first, frames)), others = failures[0], failures[1:]
    first.add_note(f"raised on rank {rank}:\n" + "".join(traceback.format_list(frames)).rstrip())
    for other, (failure, _) in others:
        first.add_note(f"rank {other} failed too: {type(failure).__name__}: {one_line(failure)}")
    return original(first) if isinstance(first, CheckpointException) else first


def noted(error: E) -> E:
    """The error with its traceback as a note, which survives pickling as a traceback does not."""
    frames = traceback.format_tb(error.__traceback__)
    if frames:
        error.add_note("".join(frames).rstrip())
    return error


def dumps(error: BaseException) -> bytes:
    """Pickle an error; one that doesn't survive that is told in the words of a CheckpointError."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # noqa: S301 - made on the line before
    except Exception:  # noqa: BLE001 - a class of the caller's own may fail in any way
        substitute = CheckpointError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            substitute.add_note(note)
        return pickle.dumps(substitute)
    return data


def loads(data: bytes) -> BaseException:
    """The error that `dumps` pickled, in a process of the same job."""
    try:
        error = pickle.loads(data)  # noqa: S301 - from a process of this job
    except Exception as unreadable:  # noqa: BLE001 - a class that only the other process can import
        return CheckpointError(f"a failure could not be read here: {type(unreadable).__name__}: {unreadable}")
    return error if isinstance(error, BaseException) else CheckpointError(f"no error but {error!r}")
