"""The archive around a tensor's bytes in DCP's format, made without copying them.

A stock item is what ``torch.save(tensor)`` writes: a zip archive with one stored record for the payload.
Its framing depends on dtype, shape and stride alone. Under ``torch.serialization.skip_data`` torch writes
the framing and seeks over the payload, which tells both apart. Payload bytes that follow in the gap give an
item that ``torch.load(weights_only=True)`` reads; the archive's CRC of that record stays zero, which torch
never looks at.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
from dataclasses import dataclass
from typing import IO, cast

import torch

from cloudckpt.backends import strides
from cloudckpt.backends.state import subclasses
from cloudckpt.backends.torch_private import FakeTensorMode, is_zerotensor
from cloudckpt.backends.transfer.segments import Fetched, Gathered, Segment, View, bytes_of


@dataclass(frozen=True, slots=True)
class Framing:
    """The bytes before and after a tensor's payload."""

    head: bytes
    tail: bytes


@dataclass(frozen=True, slots=True)
class Payload:
    """The position of a tensor's raw memory in an item, and the way to read it."""

    offset: int
    """Bytes from the beginning of the item."""
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None
    """Elements; None where it is row-major."""


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a save plan, ready to be laid into an object."""

    segments: tuple[Segment, ...]
    payload: Payload | None = None
    """None where there is no raw memory of a tensor in it."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return sum(segment.nbytes for segment in self.segments)


class FramingSink(io.RawIOBase):
    """A file that keeps what is written and remembers what was skipped."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytes]] = []
        self.gaps: list[tuple[int, int]] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        self.pieces.append((self._position, bytes(data)))
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset if whence == io.SEEK_SET else self._position + offset
        if target > self._position:
            self.gaps.append((self._position, target))
        self._position = target
        return target

    def tell(self) -> int:
        return self._position


_LARGE = 1 << 30
"""Bytes."""


@functools.lru_cache(maxsize=4096)
def framing(dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> Framing:
    """Return the framing that ``torch.save`` gives a dense tensor of this dtype, shape and stride."""
    nbytes = math.prod(shape) * dtype.itemsize
    # Never touched, so that no page becomes resident. A fake one takes none, and five times as long: a large
    # tensor that lies elsewhere may have more bytes than there is memory.
    with FakeTensorMode() if nbytes > _LARGE else contextlib.nullcontext():
        like = torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
    sink = FramingSink()
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(like, cast(IO[bytes], sink))
    if nbytes == 0:
        start = stop = sink.tell()
    elif len(sink.gaps) == 1 and sink.gaps[0][1] - sink.gaps[0][0] == nbytes:
        ((start, stop),) = sink.gaps
    else:
        raise RuntimeError(f"torch.save left gaps at {sink.gaps} for a payload of {nbytes} bytes")
    head = b"".join(data for offset, data in sink.pieces if offset < start)
    tail = b"".join(data for offset, data in sink.pieces if offset >= stop)
    return Framing(head, tail)


def encode_bytes(data: io.BytesIO) -> Item:
    """Return a non-tensor value, serialised by the planner already."""
    return Item((View(data.getbuffer(), borrowed=False),))


def encode_fetched(
    memory: Fetched, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> Item:
    """Lay out a dense tensor that is fetched when it is sent; its stride is in elements."""
    around = framing(dtype, shape, stride)
    return Item(
        (View(memoryview(around.head)), memory, View(memoryview(around.tail))),
        Payload(len(around.head), dtype, None if stride == strides.row_major(shape) else stride),
    )


def encode_tensor(tensor: torch.Tensor) -> Item:
    """Lay a tensor out as a stock item, taking its bytes from where they are.

    A dense CPU tensor is sent from its own memory, in its own memory order. Scattered views and tensors
    on a device become row-major and are gathered a window at a time. What has no plain strided memory
    (sparse, quantised, tensor subclasses) goes through ``torch.save`` into memory as a whole.
    """
    if subclasses.is_plain(tensor):  # others lose what is not a tensor, or can't be detached
        tensor = tensor.detach()
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.is_quantized:
        return encode_bytes(subclasses.serialize(tensor))
    shape = tuple(tensor.shape)
    row_major = strides.row_major(shape)
    stride = row_major
    memory: Segment
    if (
        tensor.is_conj()
        or tensor.is_neg()
        or is_zerotensor(tensor)
        or not strides.is_dense(shape, tensor.stride())
    ):
        memory = Gathered(tensor)
    else:
        if not tensor.is_contiguous():
            stride = tuple(tensor.stride())
        flat = tensor.as_strided((tensor.numel(),), (1,))
        memory = View(bytes_of(flat)) if tensor.device.type == "cpu" else Gathered(flat)
    around = framing(tensor.dtype, shape, stride)
    return Item(
        (View(memoryview(around.head)), memory, View(memoryview(around.tail))),
        Payload(len(around.head), tensor.dtype, None if stride == row_major else stride),
    )
