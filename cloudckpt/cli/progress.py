"""Progress of long commands: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import threading
import time
from typing import Final, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

from cloudckpt.cli import output

_EVERY: Final = 5.0
"""Seconds between two lines."""


class Progress(Protocol):
    """Progress of a command, reported from any thread; a context manager."""

    def begun(self, size: int) -> None:
        """So many bytes are to be done, beyond those known of."""

    def done(self, name: str, size: int) -> None:
        """So many more bytes of an object are done."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def progress(what: str) -> Progress:
    """Progress of ``what``, shown on the standard error."""
    console = output.aside()
    return Bar(what, console) if console.file.isatty() else Lines(what, console)


class Bar:
    """A bar that goes away when the work has ended."""

    def __init__(self, what: str, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._shown = RichProgress(*columns, console=console, transient=True, expand=True)
        self._task = self._shown.add_task(what, total=None)
        self._size = 0

    def begun(self, size: int) -> None:
        self._size += size
        self._shown.update(self._task, total=self._size)

    def done(self, name: str, size: int) -> None:  # noqa: ARG002 - the bar is of all objects
        self._shown.advance(self._task, size)

    def __enter__(self) -> Self:
        self._shown.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.stop()


class Lines:
    """A line every few seconds, for logs."""

    def __init__(self, what: str, console: Console, every: float = _EVERY) -> None:
        self._what, self._console, self._every = what, console, every
        self._lock = threading.Lock()
        self._size = self._done = 0
        self._said = time.monotonic()

    def begun(self, size: int) -> None:
        with self._lock:
            self._size += size

    def done(self, name: str, size: int) -> None:  # noqa: ARG002 - lines are of all objects
        with self._lock:
            self._done += size
            if (now := time.monotonic()) - self._said < self._every:
                return
            self._said = now
            how_far = f"{output.size(self._done)} of {output.size(self._size)}"
        output.say(f"{self._what}: {how_far}", console=self._console)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...
