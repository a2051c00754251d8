"""Progress of a save: written by the checkpoint process and read by its trainer, in shared memory."""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass
from typing import Final, Literal, Self, get_args

from cloudckpt.executor.snapshot.arena import new_descriptor

Phase = Literal["waiting", "starting", "planning", "writing", "committing", "committed", "done", "failed"]

_PHASES: tuple[Phase, ...] = get_args(Phase)
_SIZE = 4096
_TURN, _BEAT = 0, 1
"""Places, in words of 8 bytes: how many readings were written, and the last sign of life."""
_SLOTS = (16, 2048)
"""Places of readings, in bytes: of those with an even number, and of those with an odd one."""
_FIELDS = struct.Struct("=QQQBdH")
"""Save, bytes done, bytes in all, phase, when it last advanced, length of the object's name."""
_NAME_ROOM = 1024


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of this rank's part of a save.

    Attributes:
        bytes_done: bytes stored so far.
        bytes_total: bytes that this rank stores in all; its whole snapshot until the save is planned.
        phase: ``"waiting"`` for its turn, ``"starting"`` the process, ``"planning"``, ``"writing"``,
            ``"committing"`` (on the coordinator: uploads are completed, metadata is published),
            ``"committed"``, then ``"done"`` or ``"failed"``.
        object_name: what was stored last: an object's name, or a tensor's with another library's writer.
    """

    bytes_done: int
    bytes_total: int
    phase: Phase
    object_name: str | None = None


MAY_BE_COMMITTED: Final = (
    ". The checkpoint may be committed all the same, and is whole if it is: latest_step() tells"
)
"""A hint's last sentence, in errors of saves that another rank may have committed."""


def whether_committed(progress: Progress) -> str:
    """Return a hint's last sentence for a rank that failed here; "" where the save cannot be committed.

    Once every rank has stored its bytes, the coordinator commits without another word from them.
    """
    if progress.phase == "committed":
        return ". The checkpoint is committed, and whole"
    stored = progress.phase == "writing" and progress.bytes_done >= progress.bytes_total
    return MAY_BE_COMMITTED if stored or progress.phase == "committing" else ""


@dataclass(frozen=True, slots=True)
class Reading:
    """The state of the board at one moment. Times are of ``time.monotonic()``, which processes share."""

    save: int
    progress: Progress
    beat: float
    advanced: float


class ProgressBoard:
    """A page of shared memory: one process writes, another reads.

    Readings are written in turn to two slots, and shown by the number of the last: a reader sees a whole one
    wherever the writer was stopped or killed, and looks again when it was overtaken.
    """

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            fd = new_descriptor()
            os.ftruncate(fd, _SIZE)
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        # Through these a word is written at once: `struct` clears it first, and another process sees that.
        self._integers = memoryview(self._map).cast("Q")
        self._floats = memoryview(self._map).cast("d")
        self._lock = threading.Lock()
        self._reading = Reading(0, Progress(0, 0, "waiting"), 0.0, 0.0)

    @classmethod
    def attach(cls, fd: int) -> Self:
        """Return the board behind a descriptor."""
        return cls(fd)

    def begin(self, save: int, bytes_total: int) -> None:
        """Turn to another save."""
        with self._lock:
            self._write(save, Progress(0, bytes_total, "planning"))

    def phase(self, phase: Phase, bytes_total: int | None = None) -> None:
        """Enter a phase; ``bytes_total`` where more is known of it now."""
        with self._lock:
            now = self._reading.progress
            total = now.bytes_total if bytes_total is None else bytes_total
            self._write(self._reading.save, Progress(now.bytes_done, total, phase, now.object_name))

    def stored(self, name: str, nbytes: int) -> None:
        """Count bytes stored of an object."""
        with self._lock:
            now = self._reading.progress
            self._write(
                self._reading.save,
                Progress(min(now.bytes_done + nbytes, now.bytes_total), now.bytes_total, now.phase, name),
            )

    def beat(self) -> None:
        """Give a sign of life."""
        self._floats[_BEAT] = time.monotonic()

    def read(self) -> Reading:
        """Return the current state."""
        while True:
            turn = self._integers[_TURN]
            reading = self._parse(_SLOTS[turn % 2])
            if self._integers[_TURN] == turn:
                return reading

    def close(self) -> None:
        """Give descriptor and page back."""
        self._integers.release()
        self._floats.release()
        self._map.close()
        os.close(self.fd)

    def _write(self, save: int, progress: Progress) -> None:
        now = time.monotonic()
        self._reading = Reading(save, progress, now, now)
        name = (progress.object_name or "").encode()[:_NAME_ROOM]
        turn = self._integers[_TURN] + 1
        at = _SLOTS[turn % 2]
        phase = _PHASES.index(progress.phase)
        _FIELDS.pack_into(
            self._map, at, save, progress.bytes_done, progress.bytes_total, phase, now, len(name)
        )
        self._map[at + _FIELDS.size : at + _FIELDS.size + len(name)] = name
        self._floats[_BEAT] = now
        self._integers[_TURN] = turn

    def _parse(self, at: int) -> Reading:
        beat = self._floats[_BEAT]
        save, done, total, phase, advanced, length = _FIELDS.unpack_from(self._map, at)
        start = at + _FIELDS.size
        name = bytes(self._map[start : start + min(length, _NAME_ROOM)]).decode(errors="replace")
        progress = Progress(done, total, _PHASES[min(phase, len(_PHASES) - 1)], name or None)
        return Reading(save, progress, beat, advanced)
