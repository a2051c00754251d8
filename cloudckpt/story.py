"""The story of a run in one line a save and a load, at INFO, from the logger ``cloudckpt`` on rank 0.

Python drops messages at INFO where a program has not configured logging. These lines go to standard error
then, as warnings do, unless ``progress=False``.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from cloudckpt.backends.config import units
from cloudckpt.backends.system import background_log
from cloudckpt.backends.system.printable import one_line
from cloudckpt.events import CheckpointInfo, Loaded
from cloudckpt.executor import SaveHandle

LOGGER: Final = "cloudckpt"

_log = background_log.logger(LOGGER)


class _StandardError(logging.Handler):
    """Writes to what ``sys.stderr`` is at the moment, between the bars of tqdm."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(f"{LOGGER}: %(message)s"))

    @property
    def stream(self) -> Any:
        """The stream that is written to, which `background_log` looks at before."""
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        stream = self.stream
        if stream is None:
            return
        try:
            tqdm: Any = sys.modules.get("tqdm")
            if tqdm is not None and stream.isatty():
                tqdm.tqdm.write(self.format(record), file=stream)
            else:
                stream.write(f"{self.format(record)}\n")
                stream.flush()
        except Exception:  # noqa: BLE001 - a stream of the program's own may raise anything
            self.handleError(record)


_standard_error: Final = _StandardError()


def is_configured() -> bool:
    """Return True if the program has configured logging as far as this logger goes: a handler, or a level."""
    real = logging.getLogger(LOGGER)
    if real.hasHandlers() or real.disabled or logging.root.manager.disable >= logging.INFO:
        return True
    untouched = real.level == logging.NOTSET and logging.root.level == logging.WARNING
    return not untouched and real.getEffectiveLevel() > logging.INFO


class Story:
    """Writes the lines of one Checkpointer.

    Args:
        uri: the run, without options.
        ranks: returns how many save together.
        rank: returns the rank of this process. Only rank 0 writes.
        kept: the keep rules that are set, by the names of their arguments.
        shown: write to standard error where the program has not configured logging.
    """

    def __init__(
        self,
        uri: str,
        ranks: Callable[[], int],
        rank: Callable[[], int],
        kept: Mapping[str, object],
        *,
        shown: bool,
    ) -> None:
        self._uri, self._ranks, self._rank, self._kept, self._shown = uri, ranks, rank, kept, shown
        self._begun = False

    def begin(self) -> None:
        """Say where checkpoints go, at the first call alone."""
        if self._begun:
            return
        self._begun = True
        count = self._ranks()
        ranks = "1 rank" if count == 1 else f"{count} ranks"
        kept = ", ".join(f"{name}={value}" for name, value in self._kept.items()) or "all steps are kept"
        self._say("checkpoints go to %s (%s, %s)", one_line(self._uri), ranks, kept)

    def loaded(self, event: Loaded) -> None:
        """Say that a step was loaded, how large its checkpoint is, and how long that took."""
        self.begin()
        instead = "" if event.instead_of is None else f", instead of step {event.instead_of}"
        took = units.seconds(event.seconds)
        self._say("resumed from step %d (%s in %s)%s", event.step, units.size(event.size), took, instead)

    def follow(self, step: int, handle: SaveHandle[CheckpointInfo], blocked: float | None) -> None:
        """Say that a step is committed, once it is.

        Args:
            step: its number.
            handle: its handle.
            blocked: seconds that training waited for the snapshot; None where it waits for the commit.
        """
        if self._rank() != 0:
            return
        began = time.monotonic() - (blocked or 0.0)

        def committed(_: object) -> None:
            if handle.cancelled() or handle.failed:
                return
            took = time.monotonic() - began
            size = "a checkpoint" if handle.size is None else units.size(handle.size)
            waited = units.seconds(took if blocked is None else blocked)
            self._say(
                "step %d committed: %s in %s, training blocked for %s",
                step,
                size,
                units.seconds(took),
                waited,
            )

        handle.add_done_callback(committed)

    def _say(self, text: str, *values: object) -> None:
        if self._rank() != 0:
            return
        if is_configured():
            _log.info(text, *values)
        elif self._shown:
            record = logging.LogRecord(LOGGER, logging.INFO, __file__, 0, text, values, None)
            background_log.write(_standard_error, record)
