"""The schedule: the steps of a training loop that are saved."""

from __future__ import annotations

import time
from collections.abc import Callable

from cloudckpt.backends.errors import ConfigurationError


class Schedule:
    """Every so many steps, every so many seconds, when either says so, or all.

    Args:
        every_steps: steps that are a multiple of it are due.
        every_seconds: a step is due when so much time has passed since the last save began.

    Raises:
        ConfigurationError: a number can't be used.
    """

    def __init__(self, every_steps: int | None, every_seconds: float | None) -> None:
        given: object = every_steps
        if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
            raise ConfigurationError(
                f"every_steps is {every_steps!r}", hint="Give a whole number from 1 on, or None"
            )
        if every_seconds is not None and not every_seconds > 0:
            raise ConfigurationError(f"every_seconds is {every_seconds!r}", hint="Give more than 0, or None")
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._began = time.monotonic()

    def begin(self) -> float:
        """Note that a save begins, and tell when: by ``time.monotonic``."""
        self._began = time.monotonic()
        return self._began

    def is_due(self, step: int, broadcast_bool: Callable[[bool], bool]) -> bool:
        """Return True if a step is to be saved, on all ranks or on none, by the clock of rank 0."""
        if self._every_steps is not None and step % self._every_steps == 0:
            return True
        if self._every_seconds is None:
            return self._every_steps is None
        return broadcast_bool(time.monotonic() - self._began >= self._every_seconds)
