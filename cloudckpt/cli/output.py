"""Output of commands: answers on the standard output, everything else on the standard error.

On a terminal there is colour, and lines break where it ends. In a pipe there is neither.
"""

from __future__ import annotations

import json
import sys
import traceback
from datetime import UTC, datetime, timedelta
from typing import IO, Any, Final

from rich.console import Console
from rich.prompt import Confirm
from rich.table import Table
from rich.text import Text

from cloudckpt.backends.config import units
from cloudckpt.backends.errors import CheckpointError, ConfigurationError
from cloudckpt.backends.system.printable import lines, one_line

_UNBROKEN: Final = 1 << 16
"""Columns of a line in a pipe."""
size = units.size


def answers() -> Console:
    """Return the standard output."""
    return _console(sys.stdout)


def aside() -> Console:
    """Return the standard error: errors, questions, progress."""
    return _console(sys.stderr)


def say(text: str, style: str = "", *, console: Console | None = None) -> None:
    """Print a line of any characters."""
    (console or answers()).print(Text(one_line(text), style))


def say_json(value: Any) -> None:
    """Print a value for machines: ASCII, times in ISO 8601."""
    sys.stdout.write(json.dumps(value, indent=2, default=_as_text) + "\n")


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """Return an empty table without lines, whose cells are folded and never cut off."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def report(error: CheckpointError, *, debug: bool = False) -> None:
    """Print an error as the library words it, and with ``debug`` where it comes from."""
    console = aside()
    if debug:
        console.print(Text(lines("".join(traceback.format_exception(error)))))
    console.print(Text.assemble(("error: ", "bold red"), one_line(error)))
    for note in getattr(error, "__notes__", ()):
        console.print(Text(lines(note)))  # may hold a traceback


def can_ask() -> bool:
    """Return True if there is a terminal to ask on."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def ensure_can_ask(*, yes: bool) -> None:
    """Make sure that there is somebody to ask, or that nothing needs to be.

    Raises:
        ConfigurationError: there is no terminal.
    """
    if not (yes or can_ask()):
        raise ConfigurationError(
            "this deletes, and there is no terminal to ask on", hint="Say --yes, or look first with --dry-run"
        )


def agreed(question: str, *, yes: bool, otherwise: str = "nothing was deleted") -> bool:
    """Ask on the terminal, and return True for a yes alone; print ``otherwise`` without one."""
    if yes:
        return True
    try:
        agreement = Confirm.ask(Text(one_line(question)), console=aside(), default=False)
    except EOFError:
        agreement = False
    if not agreement:
        say(otherwise, console=aside())
    return agreement


def age(when: datetime | None, now: datetime | None = None) -> str:
    """Return the time since then, in one unit; a dash where it is unknown."""
    if when is None:
        return "-"
    passed = max(timedelta(0), (now or datetime.now(UTC)) - when)
    for unit, length in (("d", timedelta(days=2)), ("h", timedelta(hours=2)), ("min", timedelta(minutes=2))):
        if passed >= length:
            return f"{passed // (length / 2)} {unit}"
    return f"{passed // timedelta(seconds=1)} s"


def count(number: int, what: str) -> str:
    """Return a number of things: ``1 object``, ``2,000 objects``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _console(stream: IO[str]) -> Console:
    width = None if stream.isatty() else _UNBROKEN
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def _as_text(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
