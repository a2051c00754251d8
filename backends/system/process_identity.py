"""The identity of a process in a marker, by which another process of the same host can prove its death.

A process number alone proves nothing: hosts and containers number their own processes, and numbers are used
again. So the identity also has the host's name, the id of its start (``boot_id``), the namespace of process
numbers, and the time when the process started. Where one of them is missing, nothing is proven.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_PROC: Final = Path("/proc")
_ENDED: Final = frozenset("ZXx")
"""States of a process that has ended and was not yet waited for."""


def own() -> dict[str, Any]:
    """Return the identity of this process."""
    _, started = _state(os.getpid())
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "boot": _boot(),
        "namespace": _namespace(),
        "started": started,
    }


def is_dead(identity: Mapping[str, Any]) -> bool:
    """Return True if a process has certainly ended; False where it lives, or nothing proves its death.

    Args:
        identity: as `own` returned it in that process.
    """
    place = [socket.gethostname(), _boot(), _namespace()]
    pid, started = identity.get("process"), identity.get("started")
    if None in place or [identity.get(name) for name in ("host", "boot", "namespace")] != place:
        return False
    if type(pid) is not int or type(started) is not int or pid < 1:
        return False
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False  # it is there, and another user's
    state, its_start = _state(pid)
    return state in _ENDED or (its_start is not None and its_start != started)


def _state(pid: int) -> tuple[str, int | None]:
    """Return the state of a process as one letter, and when it started, in clock ticks since the boot."""
    try:
        # The name of the program, in parentheses, may hold anything.
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return "", None


@functools.cache
def _boot() -> str | None:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip() or None
    except OSError:
        return None


def _namespace() -> int | None:
    try:
        return (_PROC / "self/ns/pid").stat().st_ino
    except OSError:
        return None
