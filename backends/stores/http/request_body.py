"""The body of a request that sends many buffers as one, without joining them."""

from __future__ import annotations

import bisect
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cloudckpt.backends.stores.base import Departed

_SLICE = 1 << 20
_SMALL = 1 << 16
"""Bytes below which a buffer is not sent by itself: a call costs more than copying so many."""
_JOINED = 1 << 18
"""Bytes of small buffers that are joined at once: each connection holds so many beyond ``memory_limit``."""
_ASKED = 1 << 17
"""What urllib3 asks for, as botocore sets it up."""


@dataclass(frozen=True, slots=True)
class Rest:
    """All bytes of a body that are left, for a connection that sends them by itself."""

    body: BuffersBody

    def __len__(self) -> int:
        return len(self.body) - self.body.tell()


class BuffersBody(io.RawIOBase):
    """A seekable file over buffers laid end to end, for botocore to read, sign and send again.

    ``read`` returns slices of the buffers, not copies, of up to 1 MiB; of small buffers that follow one
    another it joins as many. So it may return less than was asked for, like any raw file. To urllib3, which
    asks for 128 KiB at a time and sends what it gets, it returns more: each piece costs a turn at the
    interpreter's lock. Buffers are one-dimensional, of unsigned bytes.

    A connection that sets ``hand_over`` gets one :class:`Rest` instead when urllib3 reads.
    """

    hand_over = False

    def __init__(self, buffers: Sequence[memoryview], departed: Departed | None = None) -> None:
        self._departed = departed
        self._buffers = [buffer for buffer in buffers if buffer.nbytes]
        self._ends = list(itertools.accumulate(buffer.nbytes for buffer in self._buffers))
        self._size = self._ends[-1] if self._ends else 0
        self._position = 0
        self._is_handed_over = False

    def __len__(self) -> int:
        return self._size

    def read(self, size: int = -1, /) -> Any:
        """Return the next bytes, at least one unless the end is reached.

        A caller that asks for more has sent what there was before, and ``departed`` is called.
        """
        if self.hand_over and size == _ASKED:
            if self._is_handed_over:
                return memoryview(b"")
            self._is_handed_over = True
            return Rest(self)
        if self._departed is not None:
            self._departed(self._position)
        if self._position >= self._size or size == 0:
            return memoryview(b"")
        room = _SLICE if size < 0 or size == _ASKED else min(size, _SLICE)
        index = bisect.bisect_right(self._ends, self._position)
        buffer = self._buffers[index]
        start = self._position - (self._ends[index] - buffer.nbytes)
        view = buffer[start : start + room]
        if view.nbytes < min(room, _SMALL):
            view = self._joined(view, index + 1, min(room, _JOINED))
        self._position += view.nbytes
        return view

    def _joined(self, first: memoryview, index: int, room: int) -> memoryview:
        """Return the first view, and with it as many small buffers from ``index`` on as there is room for."""
        views, filled = [first], first.nbytes
        for buffer in itertools.islice(self._buffers, index, None):
            if buffer.nbytes >= _SMALL or filled + buffer.nbytes > room:
                break
            views.append(buffer)
            filled += buffer.nbytes
        return memoryview(b"".join(views)) if len(views) > 1 else first

    def readinto(self, target: memoryview, /) -> int:  # type: ignore[override]
        """Fill ``target`` as far as the bytes go."""
        room, filled = memoryview(target).cast("B"), 0
        while filled < room.nbytes and (view := self.read(room.nbytes - filled)).nbytes:
            room[filled : filled + view.nbytes] = view
            filled += view.nbytes
        return filled

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the position, which may not be negative."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("negative position")
        self._position = base + offset
        self._is_handed_over = False
        return self._position
