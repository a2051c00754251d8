"""The command line, ``cloudckpt``. It takes the extra ``cli``."""

from __future__ import annotations

import io
import sys

_LIBRARIES = ("typer", "rich", "click")


def main() -> None:
    """Run the command that the arguments name, and exit with its status.

    0: done. 1: found wanting, such as a checkpoint that is damaged, missing, or not the same. 2: misused.
    """
    try:
        from cloudckpt.cli.app import app  # noqa: PLC0415 - what it takes may not be installed
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _LIBRARIES:
            raise
        sys.stderr.write('The command line takes two more libraries: pip install "cloudckpt[cli]"\n')
        raise SystemExit(2) from None
    if isinstance(sys.stdout, io.TextIOWrapper):  # names may hold what its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="cloudckpt")
    except Exception as error:
        if "--debug" in sys.argv[1:]:
            raise
        from cloudckpt.backends.printable import one_line  # noqa: PLC0415 - as late as the application

        said = one_line(f"unexpected {type(error).__name__}: {error}")
        sys.stderr.write(f"{said}. --debug shows where it comes from\n")
        raise SystemExit(1) from error
