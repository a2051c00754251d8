"""The command line, ``cloudckpt``. It takes the extra ``cli``."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_SIGNALED = 128
"""Statuses above it are of commands that a signal has ended."""
_LIBRARIES = ("typer", "rich", "click")


def main() -> None:
    """Run the command that the arguments name, and exit with its status.

    0: done. 1: a check failed, such as a checkpoint that is damaged, missing, or not the same. 2: wrong
        usage.
    """
    try:
        from cloudckpt.cli.app import app  # noqa: PLC0415 - what it takes may not be installed
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _LIBRARIES:
            raise
        from cloudckpt.backends.config.libraries import install_hint  # noqa: PLC0415 - as late as the application

        sys.stderr.write(f"{error.name} is not installed. {install_hint('cli', error.name)}\n")
        raise SystemExit(2) from None
    if isinstance(sys.stdout, io.TextIOWrapper):  # names may hold what its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    _unwind_at_signals()
    try:
        app(prog_name="cloudckpt")
    except SystemExit as ended:
        if isinstance(ended.code, int) and ended.code > _SIGNALED:
            _end_at_once(ended.code)
        raise
    except Exception as error:
        if "--debug" in sys.argv[1:]:
            raise
        from cloudckpt.backends.system.printable import one_line  # noqa: PLC0415 - as late as the application

        said = one_line(f"unexpected {type(error).__name__}: {error}")
        sys.stderr.write(f"{said}. --debug shows where it comes from\n")
        raise SystemExit(1) from error


def _unwind_at_signals() -> None:
    """Have SIGTERM and SIGHUP end a command as Ctrl-C does, so that it removes what it began to write.

    A second one ends it at once. A signal that is ignored, as under nohup, stays so.
    """
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def _end_at_once(status: int) -> NoReturn:
    """End after what the command began was removed, without the exit handlers of native libraries.

    They abort the process now and then when threads were interrupted, which would replace the status.
    """
    from cloudckpt.backends.system import background_log  # noqa: PLC0415 - as late as the application

    background_log.shut_down()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or a pipe without a reader
            stream.flush()
    os._exit(status)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)
