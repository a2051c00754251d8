"""The saves of a Checkpointer: those under way, and unobserved failures."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any, Literal, get_args

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.save.save_lease import RENEWED_EVERY, SILENT_FOR
from cloudckpt.backends.system import background_log
from cloudckpt.backends.system.printable import one_line
from cloudckpt.events import CheckpointInfo
from cloudckpt.executor import SaveHandle
from cloudckpt.executor.forks import Owner

_REMEMBERED = 16
"""Saves that are under way or have failed: more than there can be under way."""

_log = background_log.logger("cloudckpt.checkpointer")

OnFailure = Literal["raise", "warn"]

Follow = Callable[[bool], bool]
"""Rank 0's value, on every rank; each gives its own."""


def _clearings() -> list[float]:
    now = time.monotonic()
    return [now, now + SILENT_FOR.total_seconds() + RENEWED_EVERY]


class Saves:
    """Saves whose failures are observed once: by their handles, or else by what this raises or logs.

    Args:
        on_failure: ``"warn"`` logs what failed instead of raising it.
        rank: of this process. Rank 0 logs.

    Raises:
        ConfigurationError: ``on_failure`` is neither ``"raise"`` nor ``"warn"``.
    """

    def __init__(self, on_failure: OnFailure, rank: Callable[[], int]) -> None:
        if on_failure not in get_args(OnFailure):
            raise ConfigurationError(f"on_failure is {on_failure!r}", hint="Give 'raise' or 'warn'")
        self._warn = on_failure == "warn"
        self._rank = rank
        self._saves: list[tuple[int, SaveHandle[CheckpointInfo]]] = []
        self._owner = Owner("this Checkpointer")
        self._clearings = _clearings()
        """Times from which on a save is to remove what dead saves have left."""

    def add(self, step: int, handle: SaveHandle[CheckpointInfo]) -> None:
        """Remember a save from here on, and no committed one before it."""
        self._forget_committed()
        self._saves.append((step, handle))
        clears = self.clears

        def ended(save: Any) -> None:  # the handle, which must not keep itself
            if save.failed:  # its process may be gone
                self._clearings = _clearings()
            elif clears and not save.cancelled():
                self._clearings = [when for when in self._clearings if when > time.monotonic()]

        handle.add_done_callback(ended)

    @property
    def clears(self) -> bool:
        """True for a save that is to remove what dead saves have left: the first, and after a failure.

        Attempts of other hosts count as dead only later, and another save removes theirs.
        """
        return any(when <= time.monotonic() for when in self._clearings)

    def settle(self, timeout: float | None = None) -> bool:
        """Wait for every save under way, however it ends; False where ``timeout`` seconds were too few.

        Raises:
            ExecutorError: this process was forked while a save was under way.
        """
        if self._owner.is_elsewhere and not all(handle.done() for _, handle in self._saves):
            self._owner.check("a wait for the saves under way")
        return not wait([handle for _, handle in self._saves], timeout).not_done

    def raise_unobserved(self, broadcast_bool: Follow) -> None:
        """Raise, on every rank, a failure that was not observed on rank 0, or log those of this rank.

        A save ends alike on every rank, but not at the same moment, and a caller may observe its handle on
        one rank alone. A rank that raised by itself would miss the save that the others go on with.
        """
        self.raise_alike(not self._warn and broadcast_bool(self.ended_badly))

    @property
    def ended_badly(self) -> bool:
        """True if a failure is to be raised whose handle was not asked on this rank."""
        return not self._warn and any(handle.failed and not handle.observed for _, handle in self._saves)

    def raise_alike(self, ended_badly: bool) -> None:
        """Do as `raise_unobserved`, with what rank 0 found."""
        if self._warn:
            self._tell_unobserved()
            return
        if ended_badly:
            self.settle()
            self._raise_next(even_heard=True)
        self._forget_committed()

    def _forget_committed(self) -> None:
        """Keep the saves under way and those that failed: rank 0 may learn of a failure later than this rank.

        It raises the failure then.
        """
        kept = [(step, handle) for step, handle in self._saves if handle.failed or not handle.done()]
        self._saves = kept[-_REMEMBERED:]

    def raise_own(self) -> None:
        """Raise, or log, unobserved failures of this rank: the others may not come to their end."""
        if self._warn:
            self._tell_unobserved()
        else:
            self._raise_next()

    def _raise_next(self, *, even_heard: bool = False) -> None:
        """Raise the first failure of those that have ended, and forget the saves up to it."""
        failed = [at for at, (_, handle) in enumerate(self._saves) if handle.failed]
        unobserved = [at for at in failed if not self._saves[at][1].observed]
        if not unobserved and not (even_heard and failed):
            return
        at = (unobserved or failed)[0]
        step, handle = self._saves[at]
        del self._saves[: at + 1]
        if (error := handle.exception()) is not None:
            error.add_note(f"it is the save of step {step} that failed, in the background")
            raise error

    def _tell_unobserved(self) -> None:
        for step, handle in self._saves:
            if handle.failed and not handle.observed:
                error = handle.exception()
                level = background_log.warning_on(self._rank())
                name = type(error).__name__
                _log.log(level, "the save of step %d failed: %s: %s", step, name, one_line(error))
        self._saves = [(step, handle) for step, handle in self._saves if not handle.done()]
