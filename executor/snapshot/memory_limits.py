"""Memory that the machine and the control groups of this process have left, and processes that they killed.

Control groups of version 1 and 2 are read, those above this process's own included. A file that is not
there, or says something else than it should, counts as no limit: reading about memory never fails a save.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from cloudckpt.backends.errors import ExecutorError
from cloudckpt.backends.system.system_limits import control_groups

PROCESS_BYTES: Final = 256 << 20
"""Memory of its own that a checkpoint process takes. Measured with torch 2.13 for the CPU: 200 MiB once its
modules are imported, and 236 MiB after saves of 200 MiB to S3."""
CURE: Final = (
    "Give the container or machine more memory (docker run --memory, resources.limits.memory in Kubernetes, "
    "--mem of Slurm), run fewer ranks on it, or save a smaller state"
)
_ROOT_LIMIT: Final = 1 << 60
"""Version 1 writes "no limit" as a number of bytes above this."""
_PROC: Final = Path("/proc")
_GROUPS: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that is left.

    Attributes:
        nbytes: how much; the cache of files, which can be reclaimed, is part of it.
        swap: bytes that may be moved to disk beyond that.
        limit: the limit that it is left of; the machine's memory for the machine.
        owner: whose limit it is, such as ``the control group /sys/fs/cgroup/job (memory.max)``.
        key: the same for all processes that the limit holds for, and for no others.
        is_shared_memory: it is that of /dev/shm.
    """

    nbytes: int
    swap: int
    limit: int
    owner: str
    key: str = ""
    is_shared_memory: bool = False


def least_room(proc: Path = _PROC, groups: Path = _GROUPS) -> Room | None:
    """Return the least room, that of the machine or of a control group; None where neither is known."""
    return min(rooms(proc, groups), key=lambda room: room.nbytes + room.swap, default=None)


def require(nbytes: int, what: str, *, proc: Path = _PROC, groups: Path = _GROUPS) -> None:
    """Make sure that so much memory can be taken, for which the kernel would kill this process otherwise.

    Raises:
        ExecutorError: there is less.
    """
    room = least_room(proc, groups)
    if room is None or nbytes <= room.nbytes + room.swap:
        return
    raise ExecutorError(
        f"{what} needs {in_mib(nbytes)} of memory, and {in_mib(room.nbytes + room.swap)} are left of "
        f"{in_mib(room.limit)}, the limit of {room.owner}",
        hint=CURE,
    )


def kills(proc: Path = _PROC, groups: Path = _GROUPS) -> dict[str, int]:
    """Return how many processes each control group and the machine have killed for want of memory."""
    counts: dict[str, int] = {}
    for folder, version in control_groups("memory", proc, groups):
        found = _fields(folder / ("memory.oom_control" if version == 1 else "memory.events"))
        if "oom_kill" in found:
            counts[f"the control group {folder}"] = found["oom_kill"]
    machine = _fields(proc / "vmstat")
    if "oom_kill" in machine:
        counts["the machine"] = machine["oom_kill"]
    return counts


def killer_since(before: dict[str, int], proc: Path = _PROC, groups: Path = _GROUPS) -> str | None:
    """Return who has killed a process for want of memory since the counts ``before``: the smallest group."""
    now = kills(proc, groups)
    return next((owner for owner, count in now.items() if count > before.get(owner, count)), None)


def machine_key(proc: Path = _PROC) -> str:
    """Return what tells this machine, since its start, from others; empty where the system has no such id."""
    return _read(proc / "sys/kernel/random/boot_id").strip()


def rooms(proc: Path = _PROC, groups: Path = _GROUPS) -> Iterator[Room]:
    """Yield the memory that the machine and each control group have left."""
    machine = machine_key(proc)
    meminfo = _fields(proc / "meminfo")
    swap = meminfo.get("SwapFree", 0) << 10
    if "MemAvailable" in meminfo:
        total = meminfo.get("MemTotal", 0) << 10
        yield Room(meminfo["MemAvailable"] << 10, swap, total, "this machine", machine)
    seen: set[Path] = set()
    for folder, version in control_groups("memory", proc, groups):
        if folder not in seen:
            seen.add(folder)
            room = (_of_first if version == 1 else _of_second)(folder, swap)
            if room is not None:
                at = folder.stat()
                yield replace(room, key=f"{machine} {at.st_dev} {at.st_ino}")


def _of_first(folder: Path, swap: int) -> Room | None:
    limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= _ROOT_LIMIT:
        return None
    stat = _fields(folder / "memory.stat")
    cache = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in ("inactive_file", "active_file"))
    left = max(0, limit - used + min(cache, used))
    both, both_used = (
        _number(folder / "memory.memsw.limit_in_bytes"),
        _number(folder / "memory.memsw.usage_in_bytes"),
    )
    if both is not None and both_used is not None:
        swap = min(swap, max(0, both - both_used + min(cache, used) - left))
    return Room(left, swap, limit, f"the control group {folder} (memory.limit_in_bytes)")


def _of_second(folder: Path, swap: int) -> Room | None:
    limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
    if limit is None or used is None:  # "max", or no such group
        return None
    stat = _fields(folder / "memory.stat")
    cache = sum(stat.get(name, 0) for name in ("inactive_file", "active_file", "slab_reclaimable"))
    most, swapped = _number(folder / "memory.swap.max"), _number(folder / "memory.swap.current")
    if most is not None and swapped is not None:
        swap = min(swap, max(0, most - swapped))
    left = max(0, limit - used + min(cache, used))
    return Room(left, swap, limit, f"the control group {folder} (memory.max)")


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isascii() and text.isdecimal() else None


def _fields(path: Path) -> dict[str, int]:
    """Return the numbers of a file by their names, from its lines of a name and a number."""
    found: dict[str, int] = {}
    for line in _read(path).splitlines():
        name, *values = line.split()[:2] or [""]
        if values and values[0].isascii() and values[0].isdecimal():
            found[name.rstrip(":")] = int(values[0])
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def in_mib(nbytes: int) -> str:
    """Return a number of bytes in MiB."""
    return f"{nbytes / (1 << 20):,.0f} MiB"
