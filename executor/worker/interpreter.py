"""The command line of an interpreter like the trainer's: isolated, optimised and strict as that one is.

`subprocess` and multiprocessing have a function for it that is private. What is said here comes from
``sys.flags`` and ``sys.warnoptions``, which are documented. ``-X`` options but those of UTF-8 and of
development mode are the trainer's business (tracing, profiling, import times) and are not passed on.
"""

from __future__ import annotations

import sys


def options() -> list[str]:
    """Return the options of this interpreter, for another to be started with."""
    flags = sys.flags
    given = ["-I"] if flags.isolated else []
    if not flags.isolated:
        given += ["-E"] * bool(flags.ignore_environment)
        given += ["-s"] * bool(flags.no_user_site)
        given += ["-P"] * bool(flags.safe_path)
    given += ["-O"] * flags.optimize
    given += ["-B"] * bool(flags.dont_write_bytecode)
    given += ["-b"] * flags.bytes_warning
    given += ["-S"] * bool(flags.no_site)
    if flags.dev_mode:
        given += ["-X", "dev"]
    if flags.utf8_mode:
        given += ["-X", "utf8"]
    # Development mode and -b add options of their own, which they do in the other interpreter as well.
    own = (["default"] if flags.dev_mode else []) + {0: [], 1: ["default::BytesWarning"]}.get(
        flags.bytes_warning, ["error::BytesWarning"]
    )
    return given + [f"-W{option}" for option in sys.warnoptions if option not in own]
