"""Checks of the machine of a job that checkpoints: memory, descriptors, threads, a working directory."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from cloudckpt.backends.config.options import Options
from cloudckpt.backends.finding import Finding
from cloudckpt.backends.system import system_limits
from cloudckpt.backends.system.descriptors import fill_standard, filled
from cloudckpt.executor.snapshot import memory_limits
from cloudckpt.executor.snapshot.arena import memory_file
from cloudckpt.executor.snapshot.memory_limits import Room
from cloudckpt.executor.worker import main_unpickler

_GIB: Final = 1 << 30
_SHM: Final = Path("/dev/shm")  # noqa: S108 - looked at, and nothing is put there
_SMALL_SHM: Final = _GIB
"""Bytes: containers get 64 MiB unless somebody says more."""
_OF_A_PROCESS: Final = 32
"""Descriptors that a checkpoint process has open beside its requests: 11 as measured on one rank, and
those of its process group."""
_PLENTY: Final = 1024
_THREADS: Final = 24
"""Threads and processes of a trainer's saves and its checkpoint process, beside those that carry requests."""
_MORE_SHM: Final = (
    "docker run --shm-size=8g (or --ipc=host); in Kubernetes an emptyDir with medium: Memory at /dev/shm"
)


def machine(options: Options, state_size: int | None, ranks: int) -> Iterator[Finding]:
    """Look at this machine.

    Args:
        options: of the job.
        state_size: bytes of a rank's state, None where it is not given.
        ranks: of the job on this machine.
    """
    yield shared_memory(*_shm(), snapshot=None if state_size is None else state_size * ranks, memfd=_memfd())
    needed = None
    if state_size is not None:
        needed = ranks * (state_size + options.memory_limit + memory_limits.PROCESS_BYTES)
    yield memory(memory_limits.least_room(), needed)
    yield descriptors(*resource.getrlimit(resource.RLIMIT_NOFILE), options.concurrency)
    most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    own = most if most != resource.RLIM_INFINITY and os.geteuid() != 0 else None  # root may have any number
    yield threads(own, system_limits.pids_room(), ranks * (_THREADS + 2 * options.concurrency))
    fill_standard()
    yield standard_streams(filled())
    yield working_directory(main_unpickler.working_directory())


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


def memory(room: Room | None, needed: int | None) -> Finding:
    """Judge the memory that is left by what a job's snapshots and processes need, where that is known."""
    if room is None:
        return Finding("memory", "unknown", "the system does not tell how much is free")
    has = f"{_size(room.nbytes)} are free of {_size(room.limit)}, the limit of {room.owner}"
    if needed is None:
        return Finding("memory", "ok", f"{has}; say --state-size to have it compared with what a save needs")
    wants = f"{has}, and snapshots, transfers and checkpoint processes need {_size(needed)}"
    if needed > room.nbytes:
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


def threads(limit: int | None, room: tuple[int, str] | None, needed: int) -> Finding:
    """Judge the limits on threads and processes, which count as one.

    Args:
        limit: of this user (``ulimit -u``); None where there is none.
        room: how many more the container may have, and which limit says so; None where none does.
        needed: how many a job's saves start on this machine.
    """
    if limit is None and room is None:
        return Finding("threads", "ok", "no limit on threads and processes")
    said = [f"this user may have {limit:,} (ulimit -u)"] if limit is not None else []
    said += [f"{room[0]:,} more may be started (limit of {room[1]})"] if room is not None else []
    has = f"threads and processes: {' and '.join(said)}"
    if min(one for one in (limit, room and room[0]) if one is not None) < needed:
        advice = "ulimit -u 4096 before the job starts; docker run --pids-limit; podPidsLimit in Kubernetes"
        return Finding("threads", "failed", f"{has}, and saves start up to {needed:,}", advice)
    return Finding("threads", "ok", has)


def standard_streams(closed: Sequence[int]) -> Finding:
    """Judge the descriptors 0, 1 and 2, of which some were ``closed`` at the start."""
    if not closed:
        return Finding("standard streams", "ok", "the descriptors 0, 1 and 2 are open")
    what = (
        f"closed: {', '.join(map(str, closed))}; what a library opens may get that number and be printed to"
    )
    advice = "Start the job with < /dev/null and its output in a file; a save puts /dev/null in their place"
    return Finding("standard streams", "warning", what, advice)


def working_directory(path: str | None) -> Finding:
    """Judge the working directory; ``path`` is None where it was deleted."""
    if path is not None:
        return Finding("working directory", "ok", f"{path} is there")
    what = "it was deleted or can't be reached: relative paths mean nothing, and libraries may not load"
    return Finding("working directory", "warning", what, "Start the job in a folder that stays, such as /")


def _shm() -> tuple[int | None, int]:
    try:
        room = os.statvfs(_SHM)
    except OSError:
        return None, 0
    return room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize


def _memfd() -> bool:
    """Return True if memory files can be made: system and sandbox must allow them."""
    try:
        fd = memory_file()
    except OSError:
        return False
    if fd is not None:
        os.close(fd)
    return fd is not None


def _size(nbytes: int | None) -> str:
    return (
        f"{(nbytes or 0) / _GIB:,.1f} GiB"
        if (nbytes or 0) >= _GIB
        else f"{(nbytes or 0) / (1 << 20):,.0f} MiB"
    )
