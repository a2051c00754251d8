"""Unknown options and keywords: what was probably meant, and where it belongs.

Checkpointer, StorageWriter and the functions take keywords of their own and the options of a URI, all in one
call. A URI's query, the environment and the command line's ``-o`` take the options alone.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Final

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.system import background_log
from cloudckpt.backends.system.printable import one_line

_log = background_log.logger(__name__)

OWN: Final[Mapping[str, tuple[str, ...]]] = {
    "Checkpointer": (
        "keep_last",
        "keep_every",
        "keep_best",
        "every_steps",
        "every_seconds",
        "on_failure",
        "snapshots",
        "on_busy",
        "save_timeout",
        "start_timeout",
        "preemption_grace",
        "progress",
        "interface",
        "port_range",
        "on_event",
        "process_group",
        "trust",
        "overwrite",
        "rank_conflicts",
    ),
    "StorageWriter": ("overwrite", "notes"),
    "StorageReader": ("trust", "share"),
    "collect_garbage": ("older_than", "silent_for", "dry_run"),
    "delete_checkpoint": ("dry_run",),
    "verify": ("observer", "begun"),
}
"""Keywords by the class or function that takes them; a test compares them with the signatures."""
_OF_ENVIRONMENT: Final = ("interface", "port_range", "cpus", "threads")
"""Names that have a variable of their own and are no options of a URI."""
_ALIKE: Final = 0.6
_NEARLY_THE_SAME: Final = 0.85
_SECRET_WORDS: Final = (
    "secret",
    "password",
    "passwd",
    "token",
    "access_key",
    "account_key",
    "credential",
    "signature",
)
_SECRET_NAMES: Final = frozenset({"key", "api_key", "user", "username", "sas", "sig"})


def is_secret(name: str) -> bool:
    """Return True if an option of this name would be a credential."""
    plain = _plain(name)
    return plain in _SECRET_NAMES or any(word in plain for word in _SECRET_WORDS)


def check_known(name: str, kind: str, options: Iterable[str], taker: str | None = None) -> None:
    """Make sure that a name is one of the URI's options.

    Args:
        name: as it was given.
        kind: what it was given as, such as ``keyword`` or ``option in the query``.
        options: the names of the URI's options.
        taker: the class or function that it was given to, one of ``OWN``; None for a place that takes the
            URI's options alone.

    Raises:
        ConfigurationError: it is not. The hint names the nearest of the names that could stand there.
    """
    known = sorted(options)
    if name in known:
        return
    own = OWN.get(taker or "", ())
    others = [one for one, names in OWN.items() if name in names and one != taker]
    hint: str
    if is_secret(name):
        hint = "Pass what is meant for the fsspec file system in storage_options"
    elif others:
        hint = f"{name!r} is a keyword of {' and '.join(others)}, and not an option of a URI: pass it there"
    elif near := _nearest(_plain(name), own, known):
        hint = f"Did you mean {near!r}?"
    else:
        hint = f"Known: {', '.join([*own, *known])}"
    raise ConfigurationError(f"unknown {kind} {name!r}{f' of {taker}' if taker else ''}", hint=hint)


def warn_of_variables(names: Iterable[str], prefix: str, options: Iterable[str]) -> None:
    """Log environment variables that have no effect and were probably meant for an option, once a process.

    Args:
        names: of all variables.
        prefix: what those of this library begin with.
        options: the names of the URI's options.
    """
    known = sorted({*options, *_OF_ENVIRONMENT})
    for variable in names:
        name = variable.removeprefix(prefix).lower()
        if variable.startswith(prefix) and name not in known:
            _warn_of_variable(variable, name, tuple(known))


@functools.cache
def _warn_of_variable(variable: str, name: str, options: tuple[str, ...]) -> None:
    takers = [one for one, names in OWN.items() if name in names]
    if takers:
        _log.warning("%s has no effect: %s is a keyword of %s", variable, name, " and ".join(takers))
    elif near := difflib.get_close_matches(name, options, n=1, cutoff=_NEARLY_THE_SAME):
        _log.warning("%s has no effect: did you mean the option %s?", one_line(variable), near[0])


def _nearest(name: str, own: Iterable[str], options: Iterable[str]) -> str | None:
    """Return the first name that begins with this one, or else the one most like it."""
    names = [*own, *options]
    started = [one for one in names if one.startswith(f"{name}_")]
    return next(iter(started or difflib.get_close_matches(name, names, n=1, cutoff=_ALIKE)), None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
