"""An examination of a folder: which file system it is on, and how much room there is."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Final

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.finding import Finding

_GIB: Final = 1 << 30
_LITTLE: Final = 0.05
_OVER_A_NETWORK: Final = ("nfs", "cifs", "smb", "9p", "fuse", "lustre", "gpfs", "beegfs", "ceph", "afs")
_GONE_WITH_THE_MACHINE: Final = ("tmpfs", "ramfs", "overlay")


class LocalExam:
    """Looks at the folder of a ``file://`` URI."""

    def __init__(self, target: Target) -> None:
        self._root = Path(target.path)

    def reach(self) -> Generator[Finding, None, bool]:
        above = _existing(self._root)
        if not above.is_dir():
            what = f"a file stands at {above}, where a folder is needed"
            yield Finding("place", "failed", what, "Use another URI, or move the file away")
            return False
        what = f"{self._root} is there" if above == self._root else f"{self._root} will be made in {above}"
        yield Finding("place", "ok", what)
        return True

    def settings(self, example: str | None, *, gc_aborts: bool = True) -> Iterator[Finding]:
        del example, gc_aborts
        above = _existing(self._root)
        yield _kind(file_system_of(above))
        room = os.statvfs(above)
        free, total = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
        what = f"{free / _GIB:,.1f} GiB of {total / _GIB:,.1f} GiB are free"
        if free < _LITTLE * total or free < _GIB:
            yield Finding(
                "room", "warning", what, "Make room: a save needs that of a checkpoint beside the old ones"
            )
        else:
            yield Finding("room", "ok", what)

    def action(self, operation: str, error: Exception | None = None) -> str:
        del operation, error
        return ""

    def close(self) -> None:
        """There are no connections."""


def file_system_of(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Return the type of the file system that a folder is on; empty where the system does not tell."""
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    best, kind = "", ""
    real = os.path.realpath(folder)
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")
        if len(point) >= len(best) and f"{real}/".startswith(f"{point.rstrip('/')}/"):
            best, kind = point, after.split()[0]
    return kind


def _kind(kind: str) -> Finding:
    if kind.startswith(_OVER_A_NETWORK):
        what = f"{kind}: over a network, where durability and locks are the server's"
        return Finding(
            "file system", "warning", what, "Let its clients wait for the disk (sync, hard mounts)"
        )
    if kind in _GONE_WITH_THE_MACHINE:
        what = f"{kind}: gone with the machine or its container"
        return Finding("file system", "warning", what, "Use a volume, or a bucket, for what has to stay")
    return Finding("file system", "ok" if kind else "unknown", kind or "the system does not tell which it is")


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
