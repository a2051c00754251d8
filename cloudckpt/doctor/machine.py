"""What the machine gives a job that checkpoints: shared memory, memory, descriptors."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cloudckpt.backends.finding import Finding
from cloudckpt.backends.options import Options

_GIB: Final = 1 << 30
_SHM: Final = Path("/dev/shm")  # noqa: S108 - looked at, and nothing is put there
_SMALL_SHM: Final = _GIB
"""Bytes: containers get 64 MiB unless somebody says more."""
_OF_A_PROCESS: Final = 32
"""Descriptors that a checkpoint process has open beside its requests: 11 as measured on one rank, and
those of its process group."""
_PLENTY: Final = 1024
_MORE_SHM: Final = (
    "docker run --shm-size=8g (or --ipc=host); in Kubernetes an emptyDir with medium: Memory at /dev/shm"
)


def machine(options: Options, state_size: int | None, ranks: int) -> Iterator[Finding]:
    """Look at this machine.

    Args:
        options: of the job.
        state_size: bytes of a rank's state, None where nobody says.
        ranks: of the job on this machine.
    """
    yield shared_memory(*_shm(), snapshot=None if state_size is None else state_size * ranks, memfd=_memfd())
    yield memory(available(), None if state_size is None else ranks * (state_size + options.memory_limit))
    yield descriptors(*resource.getrlimit(resource.RLIMIT_NOFILE), options.concurrency)


def shared_memory(size: int | None, free: int, *, snapshot: int | None, memfd: bool) -> Finding:
    """Judge ``/dev/shm``: ``size`` bytes, None where there is none, of which so many are ``free``.

    ``memfd`` says whether snapshots can do without it, as on Linux; else they need its ``snapshot`` bytes.
    """
    if size is None and memfd:
        return Finding("shared memory", "ok", "snapshots lie in memory files, which need no /dev/shm")
    if size is None:
        return Finding(
            "shared memory", "unknown", "this system has no /dev/shm: a snapshot shows what it takes"
        )
    has = f"{_SHM} has {_size(size)}, {_size(free)} of it free"
    if not memfd and free < (snapshot or _SMALL_SHM):
        needs = f", and snapshots need {_size(snapshot)} of it" if snapshot else ", and snapshots lie in it"
        return Finding("shared memory", "failed", has + needs, _MORE_SHM)
    if size < _SMALL_SHM:
        what = f"{has}: too little for NCCL and data loaders; snapshots do without"
        return Finding("shared memory", "warning", what, _MORE_SHM)
    return Finding("shared memory", "ok", f"{has}{'; snapshots do without' if memfd else ''}")


def memory(free: int | None, needed: int | None) -> Finding:
    """Judge the memory that is ``free`` by what a job's snapshots and transfers need, where that is known."""
    if free is None:
        return Finding("memory", "unknown", "the system does not tell how much is free")
    has = f"{_size(free)} are free for this container or machine"
    if needed is None:
        return Finding("memory", "ok", f"{has}; say --state-size to have it compared with what a save needs")
    wants = f"{has}, and snapshots and transfers need {_size(needed)}"
    if needed > free:
        advice = "Give the job more memory, fewer ranks a machine, or a smaller state; lower memory_limit"
        return Finding("memory", "failed", wants, advice)
    return Finding("memory", "ok", wants)


def descriptors(soft: int, hard: int, concurrency: int) -> Finding:
    """Judge the limits on open files of a process that has so many requests in flight."""
    # Twice: s3fs has connections of its own beside those that carry the bytes.
    needed = _OF_A_PROCESS + 2 * concurrency
    if soft == resource.RLIM_INFINITY:
        return Finding("descriptors", "ok", "a process may have any number of files open")
    has = f"a process may have {soft:,} files open (ulimit -n)"
    raised = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    advice = (
        f"ulimit -n 65536 before the job starts (it may be raised to {raised}); docker run --ulimit "
        "nofile=65536:65536; LimitNOFILE= in systemd"
    )
    if soft < needed:
        what = f"{has}, and with concurrency={concurrency} one needs {needed:,}"
        return Finding("descriptors", "failed", what, f"{advice}; or lower concurrency")
    if soft < _PLENTY:
        what = f"{has}: enough to save, and little for data loaders and a job of many ranks"
        return Finding("descriptors", "warning", what, advice)
    return Finding("descriptors", "ok", has)


def available(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that are free for this process: the machine's, and those of its control groups."""
    found = [one for one in (_of_machine(proc), *_of_groups(proc, groups)) if one is not None]
    return min(found, default=None)


def _of_machine(proc: Path) -> int | None:
    for line in _read(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _of_groups(proc: Path, groups: Path) -> Iterator[int | None]:
    """What is left below the limit of each group that this process is in, and of those above it."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        # In a container the group's own folder is the root that is mounted.
        root = groups / kinds if kinds else groups
        below = Path(path.lstrip("/"))
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        )
        for folder in (root / below, *((root / above) for above in below.parents), root):
            yield _left(folder, *names)


def _left(folder: Path, limit: str, usage: str) -> int | None:
    most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
    if not most.isdecimal() or not used.isdecimal():  # "max", or no such group
        return None
    stat = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines())
    given_up = int(stat.get("inactive_file", "0"))  # the cache of files, which makes room
    return max(0, int(most) - int(used) + given_up)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _shm() -> tuple[int | None, int]:
    try:
        room = os.statvfs(_SHM)
    except OSError:
        return None, 0
    return room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize


def _memfd() -> bool:
    """Whether memory files can be made here: the system has to know them, and a sandbox to let them be."""
    if not hasattr(os, "memfd_create"):
        return False
    try:
        os.close(os.memfd_create("cloudckpt", os.MFD_CLOEXEC))
    except OSError:
        return False
    return True


def _size(nbytes: int | None) -> str:
    return (
        f"{(nbytes or 0) / _GIB:,.1f} GiB"
        if (nbytes or 0) >= _GIB
        else f"{(nbytes or 0) / (1 << 20):,.0f} MiB"
    )
