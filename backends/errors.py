"""The error tree: what went wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Self

from cloudckpt.backends.system.printable import one_line


class CheckpointError(Exception):
    """The root of every error that cloudckpt raises.

    Args:
        message: what happened, in one sentence.
        uri: the checkpoint or store concerned, never with a credential in it.
        object_name: the object below ``uri``, such as ``__0_0.<id>.distcp``.
        rank: the rank on which it happened.
        hint: what the reader of the message can do.

    Every field survives pickling, so that a failure on one rank arrives whole on the others.
    """

    def __init__(
        self,
        message: str,
        *,
        uri: str | None = None,
        object_name: str | None = None,
        rank: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.uri = uri
        self.object_name = object_name
        self.rank = rank
        self.hint = hint

    def located(
        self, *, uri: str | None = None, object_name: str | None = None, rank: int | None = None
    ) -> Self:
        """Fill in what a lower layer could not know, keep what it did, and return the error."""
        self.uri = self.uri if self.uri is not None else uri
        self.object_name = self.object_name if self.object_name is not None else object_name
        self.rank = self.rank if self.rank is not None else rank
        return self

    def __str__(self) -> str:
        """Render message, place and advice on one line: ``message (uri, object name, rank 1). Hint.``.

        Characters that are not printable are escaped. The fields have them as they are.
        """
        places = [self.uri, self.object_name and f"object {self.object_name}"]
        if self.rank is not None:
            places.append(f"rank {self.rank}")
        where = ", ".join(place for place in places if place)
        text = f"{self.message} ({where})" if where else self.message
        return one_line(f"{text}. {self.hint}" if self.hint else text)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by message and fields; OSError's own protocol would drop them."""
        return (_rebuild, (type(self), self.message, dict(self.__dict__)))


_NAMED: Final = 4
"""Ranks or failures named in a note: a job may have thousands of ranks."""


def note_others(error: BaseException, others: Mapping[int, BaseException]) -> None:
    """Note on an error which other ranks failed, and how: one line for each kind of failure."""
    kinds: dict[tuple[type[BaseException], str], list[int]] = {}
    for rank, failure in sorted(others.items()):
        kinds.setdefault(_kind(failure), []).append(rank)
    alike = kinds.pop(_kind(error), None)
    if alike is not None:
        error.add_note(f"{_named(alike)} failed in the same way")
    for (cls, _), ranks in list(kinds.items())[:_NAMED]:
        error.add_note(f"{_named(ranks)} failed too: {cls.__name__}: {one_line(others[ranks[0]])}")
    if len(kinds) > _NAMED:
        error.add_note(f"other ranks failed in {len(kinds) - _NAMED:,} more ways")


def _kind(error: BaseException) -> tuple[type[BaseException], str]:
    return type(error), error.message if isinstance(error, CheckpointError) else str(error)


def _named(ranks: list[int]) -> str:
    """Return ``rank 3``, ``ranks 1 and 2``, or ``ranks 1, 2, 3, 4 and 59 more``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    named, more = ranks[:_NAMED], len(ranks) - _NAMED
    *first, last = [*map(str, named), f"{more:,} more"] if more > 0 else map(str, named)
    return f"ranks {', '.join(first)} and {last}"


def _rebuild(cls: type[CheckpointError], message: str, fields: dict[str, Any]) -> CheckpointError:
    error = cls(message)
    error.__dict__.update(fields)
    return error


class ConfigurationError(CheckpointError, ValueError):
    """A URI, an option or a state that cannot be used as given."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No committed checkpoint at this URI."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """A committed checkpoint is already there, or another job committed it first."""


class StorageError(CheckpointError, OSError):
    """The store could not do what was asked."""


class ObjectNotFoundError(StorageError, FileNotFoundError):
    """An object, or the bucket or folder that should hold it, is not there."""


class AccessDeniedError(StorageError, PermissionError):
    """The store refused the credentials, or they lack a permission."""


class PreconditionFailedError(StorageError, FileExistsError):
    """A conditional put lost: the object exists, or is no longer the version expected."""


class UnsupportedError(StorageError):
    """The store has no such request."""


class UnansweredError(StorageError):
    """A request went out and no answer came: it may have been carried out, or still be."""


class CommitError(StorageError):
    """The global commit did not happen."""


class UncertainCommitError(CommitError):
    """No answer tells whether the commit happened: the checkpoint may be there or appear later."""


class IntegrityError(CheckpointError, ValueError):
    """Stored bytes are missing, short or altered."""


class UnsafeCheckpointError(CheckpointError, ValueError):
    """Reading this checkpoint would run code that it carries."""

    classes: tuple[str, ...] = ()
    """The classes and functions that could run code, with their modules, as far as they are known."""


class ExecutorError(CheckpointError, RuntimeError):
    """The background checkpoint process could not serve a save."""

    unreachable = False
    """True if a rank could not reach the store in which the ranks meet: the next call chooses another."""


class ExecutorDiedError(ExecutorError):
    """The background checkpoint process ended before it answered."""


class SaveTimeoutError(CheckpointError, TimeoutError):
    """A save did not end within its deadline."""
