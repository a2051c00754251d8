"""A small ``/dev/shm``, as containers have it, for one command."""

from __future__ import annotations

import functools
import shutil
import subprocess

SHM_MIB = 64
SMALL_SHM = f'mount -t tmpfs -o size={SHM_MIB}m tmpfs /dev/shm && exec "$@"'
"""A script that runs its arguments so, where it may mount."""


@functools.cache
def private_mounts() -> tuple[str, ...] | None:
    """The command that runs another where it may mount what nobody else sees, or None."""
    unshare = shutil.which("unshare")
    for flags in ("-m", "-rm"):
        if (
            unshare
            and subprocess.run(
                [unshare, flags, "sh", "-c", SMALL_SHM, "sh", "true"], check=False, capture_output=True
            ).returncode
            == 0
        ):
            return (unshare, flags)
    return None
