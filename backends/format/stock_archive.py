"""Items as stock DCP wrote them, without a record of the payload's position.

An item is a ``torch.save`` archive. Its beginning and its end say everything but the payload, so a large
item is opened by reading those two, and its payload is then read like one of ours.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, cast

import torch

from cloudckpt.backends.state.codec.archive import checked_archive

PROBE = 32 << 10
"""Bytes read from either end of an item; the framing of a plain tensor takes about 2 kB."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Raw memory of a tensor within an object."""

    offset: int
    """Bytes from the beginning of the object to the tensor's first element."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Elements."""


class Positioned(io.RawIOBase):
    """A file of a known size to read anywhere in, but for the reading."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position


class EndsOnly(Positioned):
    """An item of which only the two ends are known; touching the middle is an error."""

    def __init__(self, head: bytes, tail: bytes, size: int) -> None:
        super().__init__(size)
        self._head, self._tail = head, tail

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        start = self._position
        stop = min(start + len(buffer), self._size)
        tail_at = self._size - len(self._tail)
        if stop <= len(self._head):
            data = self._head[start:stop]
        elif start >= tail_at:
            data = self._tail[start - tail_at : stop - tail_at]
        else:
            raise _MiddleNeededError
        buffer[: len(data)] = data
        self._position = stop
        return len(data)

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        data = bytearray(left if size < 0 else min(size, left))  # an archive may ask for what it likes
        with memoryview(data) as view:
            return bytes(data[: self.readinto(view)])


class _MiddleNeededError(Exception):
    """The framing is larger than what was read of it."""


def locate(offset: int, length: int, read: Callable[[int, int], bytes]) -> Stored | None:
    """Find the payload of the item at ``offset`` of an object, ``length`` bytes long.

    ``read(offset, size)`` returns bytes of the object. None where the item is not the archive of one plain
    tensor, so that it has to be loaded as a whole. Nothing in the archive is run.
    """
    size = min(PROBE, length)
    head, tail = read(offset, size), read(offset + length - size, size)
    ends = EndsOnly(head, tail, length)
    try:
        with zipfile.ZipFile(ends) as archive:
            payloads = [info for info in archive.infolist() if "/data/" in info.filename]
        ends.seek(0)
        described = checked_archive(cast(IO[bytes], ends), length)
        if described.has_record("byteorder") and described.get_record("byteorder") != sys.byteorder.encode():
            return None  # its payload has to be turned round, and is so where it is read as a whole
        ends.seek(0)
        with torch.serialization.skip_data():
            tensor = torch.load(cast(IO[bytes], ends), weights_only=True)
    except Exception:  # noqa: BLE001 - reading it as a whole says what is wrong with it
        return None
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or len(payloads) != 1:
        return None
    header = payloads[0].header_offset
    if tensor.is_conj() or tensor.is_neg() or tensor.is_quantized or header + 30 > len(head):
        return None
    # A local header is 30 bytes long, and its last four say how long the name and the extra field after it
    # are.
    name, extra = (int.from_bytes(head[header + at : header + at + 2], "little") for at in (26, 28))
    first = header + 30 + name + extra + int(tensor.storage_offset()) * tensor.itemsize
    return Stored(offset + first, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))
