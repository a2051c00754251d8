"""Contents of an object: segments laid end to end, and windows on them.

A segment is either a view of bytes that are in memory already, or a tensor that has to be gathered first
(it lives on a device, or its elements are scattered). A part is a window on the segments of an object: it
takes views as they are and gathers only the bytes that lie inside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from cloudckpt.backends.transfer.cuda import beside, settle


class Segment(Protocol):
    """A run of bytes of an object."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        ...

    @property
    def borrowed(self) -> bool:
        """True when the bytes are the caller's own; False when memory is held for them."""
        ...

    def window(self, start: int, stop: int, scratch: memoryview) -> memoryview:
        """Bytes ``start`` to ``stop`` of the segment, brought to ``scratch`` where they are not in memory."""
        ...

    def gathered(self, start: int, stop: int) -> int:
        """Bytes of scratch memory that this takes."""
        ...

    @property
    def on_device(self) -> bool:
        """True if the bytes come from a device."""
        ...


@dataclass(frozen=True, slots=True)
class View:
    """Bytes that are in memory; a window on them is a slice."""

    data: memoryview
    borrowed: bool = True

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def window(self, start: int, stop: int, scratch: memoryview) -> memoryview:  # noqa: ARG002 - the interface's
        return self.data[start:stop]

    def gathered(self, start: int, stop: int) -> int:  # noqa: ARG002 - the interface's
        return 0

    @property
    def on_device(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Gathered:
    """The elements of a tensor in row-major order, brought to host memory window by window.

    A window costs its own length in memory, regardless of the size of the tensor.
    """

    tensor: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.itemsize

    @property
    def borrowed(self) -> bool:
        return False

    def window(self, start: int, stop: int, scratch: memoryview) -> memoryview:
        itemsize = self.tensor.itemsize
        first, last = start // itemsize, -(-stop // itemsize)
        host = torch.frombuffer(scratch, dtype=torch.uint8, count=(last - first) * itemsize)
        with beside(self.tensor):
            _copy_range(self.tensor, first, last, host.view(self.tensor.dtype))
        return scratch[start - first * itemsize : stop - first * itemsize]

    def gathered(self, start: int, stop: int) -> int:
        itemsize = self.tensor.itemsize
        return (-(-stop // itemsize) - start // itemsize) * itemsize

    @property
    def on_device(self) -> bool:
        return self.tensor.is_cuda


@dataclass(frozen=True, slots=True)
class Wanted:
    """Elements of a tensor that lies elsewhere, counted in the order of its memory, and where they go."""

    key: str
    first: int
    last: int
    into: memoryview


class Origin(Protocol):
    """The source of tensors that are fetched when they are sent."""

    def fetch(self, wanted: Sequence[Wanted]) -> None:
        """Fetch all of it, on any thread."""
        ...


@dataclass(frozen=True, slots=True)
class Fetched:
    """A tensor that lies elsewhere, and is brought window by window as it is sent.

    What a window has of several is fetched together. ``seen`` is called with the position in the segment of
    bytes that have come, and what they are.
    """

    origin: Origin
    key: str
    nbytes: int
    itemsize: int
    seen: Callable[[int, memoryview], None] | None = None

    @property
    def borrowed(self) -> bool:
        return False

    @property
    def on_device(self) -> bool:
        return False

    def window(self, start: int, stop: int, scratch: memoryview) -> memoryview:
        self.origin.fetch([self.wanted(start, stop, scratch)])
        return self.arrived(start, stop, scratch)

    def wanted(self, start: int, stop: int, scratch: memoryview) -> Wanted:
        """Return the elements to fetch for bytes ``start`` to ``stop``, whole ones, into ``scratch``."""
        first, last = start // self.itemsize, -(-stop // self.itemsize)
        return Wanted(self.key, first, last, scratch[: (last - first) * self.itemsize])

    def arrived(self, start: int, stop: int, scratch: memoryview) -> memoryview:
        """Return those bytes, once they have been fetched."""
        begin = start - start // self.itemsize * self.itemsize
        data = scratch[begin : begin + stop - start]
        if self.seen is not None:
            self.seen(start, data)
        return data

    def gathered(self, start: int, stop: int) -> int:
        return (-(-stop // self.itemsize) - start // self.itemsize) * self.itemsize


@dataclass(frozen=True, slots=True)
class Late:
    """Bytes that are only known once others of the same object have been brought."""

    nbytes: int
    make: Callable[[], bytes]

    @property
    def borrowed(self) -> bool:
        return False

    @property
    def on_device(self) -> bool:
        return False

    def window(self, start: int, stop: int, scratch: memoryview) -> memoryview:  # noqa: ARG002 - the interface's
        return memoryview(self.make())[start:stop]

    def gathered(self, start: int, stop: int) -> int:  # noqa: ARG002 - the interface's
        return 0


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, as writable bytes that keep the tensor alive."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _copy_range(tensor: torch.Tensor, first: int, last: int, out: torch.Tensor) -> None:
    """Copy elements ``first`` to ``last``, counted in row-major order, without flattening the tensor."""
    # torch conjugates and negates on the host what has come from a device, and waits for nothing before.
    non_blocking = not (tensor.is_conj() or tensor.is_neg())
    if tensor.is_contiguous():
        out.copy_(tensor.reshape(-1)[first:last], non_blocking=non_blocking)
        return
    if tensor.dim() == 1:
        out.copy_(tensor[first:last], non_blocking=non_blocking)
        return
    row = math.prod(tensor.shape[1:])
    top, bottom = first // row, (last - 1) // row
    if top == bottom:
        _copy_range(tensor[top], first - top * row, last - top * row, out)
        return
    done = 0
    if first > top * row:
        done = (top + 1) * row - first
        _copy_range(tensor[top], first - top * row, row, out[:done])
        top += 1
    whole = last // row - top
    if whole:
        rows = out[done : done + whole * row].view(whole, *tensor.shape[1:])
        rows.copy_(tensor[top : top + whole], non_blocking=non_blocking)
        done += whole * row
        top += whole
    if done < last - first:
        _copy_range(tensor[top], 0, last - first - done, out[done:])


@dataclass(frozen=True, slots=True)
class Window:
    """Some consecutive bytes of an object, as pieces of its segments."""

    offset: int
    """Where the window begins in the object."""
    pieces: tuple[tuple[Segment, int, int], ...]

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return sum(stop - start for _, start, stop in self.pieces)

    @property
    def cost(self) -> int:
        """Bytes of memory that the window needs: values held already, and what is gathered."""
        return self.gathered + sum(
            stop - start
            for segment, start, stop in self.pieces
            if not segment.borrowed and not segment.gathered(start, stop)
        )

    @property
    def gathered(self) -> int:
        """Bytes of scratch memory that `buffers` fills."""
        return sum(_aligned(segment.gathered(start, stop)) for segment, start, stop in self.pieces)

    @property
    def from_device(self) -> bool:
        """True if some of the bytes come from a device."""
        return any(segment.on_device for segment, _, _ in self.pieces)

    def buffers(self, scratch: memoryview) -> list[memoryview]:
        """Return the window's bytes: views where they are in memory, and where not, copies in ``scratch``."""
        buffers: list[memoryview] = [scratch[:0]] * len(self.pieces)
        fetching: list[_Fetching] = []
        late: list[int] = []
        used = 0
        try:
            for at, (segment, start, stop) in enumerate(self.pieces):
                if isinstance(segment, Fetched):
                    fetching.append((at, segment, start, stop, scratch[used:]))
                elif isinstance(segment, Late):
                    late.append(at)
                else:
                    buffers[at] = segment.window(start, stop, scratch[used:])
                used += _aligned(segment.gathered(start, stop))
        finally:
            settle()
        _fetch(fetching)
        for at, segment, start, stop, own in fetching:
            buffers[at] = segment.arrived(start, stop, own)
        for at in late:
            segment, start, stop = self.pieces[at]
            buffers[at] = segment.window(start, stop, scratch)
        return buffers


_Fetching = tuple[int, Fetched, int, int, memoryview]
"""Which piece it is, what of it, and where that goes."""


def _fetch(pieces: Iterable[_Fetching]) -> None:
    """Fetch together what comes from one origin."""
    wanted: dict[int, tuple[Origin, list[Wanted]]] = {}
    for _, segment, start, stop, own in pieces:
        _, together = wanted.setdefault(id(segment.origin), (segment.origin, []))
        together.append(segment.wanted(start, stop, own))
    for origin, together in wanted.values():
        origin.fetch(together)


_ELEMENT = 16
"""Bytes of the largest element (complex128), at multiples of which gathered pieces begin."""


def _aligned(size: int) -> int:
    return -(-size // _ELEMENT) * _ELEMENT


_Piece = tuple[Segment, int, int]


def windows(segments: Iterable[Segment], size: int, spare: int = 0) -> Iterator[Window]:
    """Cut a stream of segments into windows of ``size`` bytes; the last one may be shorter.

    Segments are taken from the iterable only when they are needed, so an object can be sent while its later
    items have not been made yet. An empty stream has no windows.

    Args:
        segments: the stream.
        size: bytes of each window but the last.
        spare: bytes by which the last window may be longer than ``size``, so that a short rest of the stream
            is no window of its own. So many bytes of the stream are taken ahead.
    """
    offset = 0
    pieces: list[_Piece] = []
    filled = 0
    for segment in segments:
        start = 0
        while start < segment.nbytes:
            if filled == size + spare:  # and more follows
                first, pieces = _split(pieces, size)
                yield Window(offset, first)
                offset, filled = offset + size, spare
            stop = min(segment.nbytes, start + size + spare - filled)
            pieces.append((segment, start, stop))
            filled += stop - start
            start = stop
            if filled == size and not spare:
                yield Window(offset, tuple(pieces))
                offset += filled
                pieces, filled = [], 0
    if pieces:
        yield Window(offset, tuple(pieces))


def _split(pieces: Sequence[_Piece], size: int) -> tuple[tuple[_Piece, ...], list[_Piece]]:
    """Return the pieces of the first ``size`` bytes, and the others."""
    first: list[_Piece] = []
    for index, (segment, start, stop) in enumerate(pieces):
        if stop - start >= size:
            rest = [(segment, start + size, stop)] if stop - start > size else []
            return (*first, (segment, start, start + size)), [*rest, *pieces[index + 1 :]]
        first.append((segment, start, stop))
        size -= stop - start
    return tuple(first), []


def part_size_of(segments: Iterable[Segment], usual: int, longest: int) -> tuple[Iterable[Segment], int]:
    """Return the segments, and ``longest`` where parts of so many bytes need hardly more memory than usual.

    They don't where what comes first are views of the caller's memory. All parts of an object get one size,
    for not every store takes them otherwise.
    """
    taken: list[Segment] = []
    rest, room, cost = iter(segments), longest, 0
    while usual < longest and room > 0 and (segment := next(rest, None)) is not None:
        taken.append(segment)
        room -= segment.nbytes
        cost += 0 if segment.borrowed else segment.nbytes
        if cost > usual // 8:
            longest = usual
    return itertools.chain(taken, rest), longest
