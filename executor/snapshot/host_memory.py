"""Memory that the snapshots of all ranks of a host need, compared with what is left before any is taken.

Each rank would find room for its own snapshot as long as the others' are not there. So ranks exchange what
they need and what they see of the limits: the machine's, those of control groups, and that of /dev/shm where
snapshots lie there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Self

from cloudckpt.backends.errors import ExecutorError
from cloudckpt.backends.system import background_log
from cloudckpt.executor.coordination import wire_format
from cloudckpt.executor.coordination.rendezvous import MeetingPlace
from cloudckpt.executor.snapshot import memory_limits
from cloudckpt.executor.snapshot.arena import memory_file
from cloudckpt.executor.snapshot.memory_limits import CURE, PROCESS_BYTES, Room, in_mib

_log = background_log.logger(__name__)

_SHM: Final = Path("/dev/shm")  # noqa: S108 - its size is read, and nothing is put there
_MORE_SHM: Final = (
    "Give the container a larger /dev/shm: docker run --shm-size=8g (or --ipc=host); in Kubernetes an "
    "emptyDir with medium: Memory at /dev/shm"
)


@dataclass(frozen=True, slots=True)
class Need:
    """The memory that one rank's snapshots need, and the rooms that it would take it from.

    Attributes:
        nbytes: of all snapshots that the rank may hold at once.
        processes: bytes of a checkpoint process that is still to be started.
        rooms: limits that hold for the rank; one is recognized by its key on several ranks.
    """

    nbytes: int
    processes: int
    rooms: tuple[Room, ...]

    @classmethod
    def of(cls, nbytes: int, processes: int = PROCESS_BYTES) -> Self:
        """Return the need of this process, with what is left now."""
        return cls(nbytes, processes, (*memory_limits.rooms(), *_shared_memory()))


def check(own: Need, every: Sequence[Need | None]) -> None:
    """Make sure that the snapshots of all ranks that share a limit with this one fit into it.

    Args:
        own: this rank's need.
        every: the needs of all ranks, this one's included; None of a rank that has none to tell.

    Raises:
        ExecutorError: they certainly don't fit.
    """
    for room in own.rooms:
        sharing = [need for need in every if need is not None and any(r.key == room.key for r in need.rooms)]
        total = sum(need.nbytes for need in sharing)
        left = min(r.nbytes for need in sharing for r in need.rooms if r.key == room.key)
        ranks = (
            "the snapshots of this rank" if len(sharing) == 1 else f"the snapshots of {len(sharing)} ranks"
        )
        message = (
            f"{ranks} on this host need {in_mib(total)} of memory, and {in_mib(left)} are left of "
            f"{in_mib(room.limit)}, the limit of {room.owner}"
        )
        cure = _MORE_SHM if room.is_shared_memory else CURE
        if total > left + room.swap:
            raise ExecutorError(message, hint=cure)
        if total + (0 if room.is_shared_memory else sum(need.processes for need in sharing)) > left:
            _log.warning("%s: a save may run out of memory. %s", message, cure)


@dataclass(frozen=True, slots=True)
class _Report:
    """The need of a rank; None where it could not be found out."""

    need: Need | None


class Comparison:
    """A block in which a rank finds its ``need``; at its end the needs of all ranks are compared.

    A rank whose block raises does not wait, and the others do not wait for it.

    Args:
        place: where the ranks meet; None in a single process.
        number: of the call, the same on every rank.
        timeout: seconds to wait for the others.

    Raises:
        ExecutorError: the snapshots of the ranks of this host don't fit.
    """

    def __init__(self, place: MeetingPlace | None, number: int, timeout: float) -> None:
        self._place, self._number, self._timeout = place, number, timeout
        self.need: Need | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        every = self._exchanged()
        if kind is None and self.need is not None:
            check(self.need, every)

    def _exchanged(self) -> Sequence[Need | None]:
        """Return the needs of all ranks, or this rank's alone where another does not come."""
        place, number = self._place, self._number
        if place is None:
            return [self.need]

        def exchange() -> Sequence[Need | None]:
            store: Any = place.connect("memory", self._timeout)  # torch's stub lacks multi_get
            store.set(f"{number}/{place.rank}", wire_format.text(_Report(self.need)))
            if self.need is None:
                return []
            keys = [f"{number}/{rank}" for rank in range(place.world_size)]
            store.wait(keys, timedelta(seconds=self._timeout))
            values = zip(keys, store.multi_get(keys), strict=True)
            return [wire_format.message(text, _Report, key).need for key, text in values]

        try:
            return place.bounded("compare their memory", exchange, self._timeout)
        except ExecutorError as error:  # the ranks meet after this, which tells who is missing
            _log.debug("%s", error)
            return [self.need]


def _shared_memory() -> tuple[Room, ...]:
    """Return /dev/shm, if snapshots lie there."""
    try:
        fd = memory_file()
        if fd is not None:
            os.close(fd)
            return ()
        size, device = os.statvfs(_SHM), _SHM.stat().st_dev
    except OSError:
        return ()
    return (
        Room(
            size.f_bavail * size.f_frsize,
            0,
            size.f_blocks * size.f_frsize,
            f"{_SHM}, where snapshots lie as memfd_create is refused",
            f"{memory_limits.machine_key()} shm {device}",
            is_shared_memory=True,
        ),
    )
