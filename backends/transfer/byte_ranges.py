"""From boxes of stored tensors to ranged requests.

A stored tensor is raw memory of a given shape and stride; a rank that reshards wants a box of it. ``cut``
turns the box into pieces that are each worth one read, and ``merge`` turns the byte ranges of many pieces
into few requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from cloudckpt.backends.checksums import Expected
from cloudckpt.backends.strides import span as span_of
from cloudckpt.backends.transfer.cuda import settle

GAP = 64 << 10
"""Bytes between two wanted ranges that cost less to read than another request does."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a box that is read at once.

    ``starts`` and ``lengths`` say which part of the box. Its elements lie from ``first`` on in the stored
    memory, and ``span`` elements hold them all.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    first: int
    span: int


def cut(
    lengths: tuple[int, ...], strides: tuple[int, ...], first: int, most: int, gap: int
) -> Iterator[Piece]:
    """Cut a box into pieces that span at most ``most`` elements and have no hole of more than ``gap``.

    Strides are in elements; ``first`` is where the box's first element lies in the stored memory.
    """
    yield from _cut(tuple(0 for _ in lengths), lengths, strides, first, most, gap)


def _cut(  # noqa: PLR0917 - recursive, over plain tuples
    starts: tuple[int, ...],
    lengths: tuple[int, ...],
    strides: tuple[int, ...],
    first: int,
    most: int,
    gap: int,
) -> Iterator[Piece]:
    span = span_of(lengths, strides)
    if span == 0:
        return
    outer = max(
        (dim for dim, length in enumerate(lengths) if length > 1), key=lambda dim: strides[dim], default=None
    )
    if outer is None:
        yield Piece(starts, lengths, first, span)
        return
    stride, length = strides[outer], lengths[outer]
    inner = span - (length - 1) * stride
    together = length
    if stride - inner > gap:
        together = 1
    elif span > most:
        # The part that the box has of each slice: adjacent boxes are cut alike, and can be read together.
        together = max(1, min(length - 1, most // stride))
    if together == length:
        yield Piece(starts, lengths, first, span)
        return
    for at in range(0, length, together):
        yield from _cut(
            (*starts[:outer], starts[outer] + at, *starts[outer + 1 :]),
            (*lengths[:outer], min(together, length - at), *lengths[outer + 1 :]),
            strides,
            first + at * stride,
            most,
            gap,
        )


def whole_slices(piece: Piece, strides: tuple[int, ...], before: int, end: int) -> tuple[int, int]:
    """Return the elements to read before and after a piece with holes, for whole slices of a tensor.

    All boxes that have some of each slice then need the same bytes, which one rank can read for several.
    ``before`` elements of the tensor's memory come before the piece; the memory has ``end`` of them.
    """
    if piece.span <= math.prod(piece.lengths):
        return 0, 0
    slices = max(stride for stride, length in zip(strides, piece.lengths, strict=True) if length > 1)
    last = before + piece.span
    return before % slices, min(end - last, -last % slices)


def nothing() -> None:
    """No-op completion callback."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A wanted range of an object's bytes.

    ``into`` is filled straight from the store; without it the bytes go through a buffer of the reader's to
    ``deliver``. ``done`` is called once they have arrived and have been compared with what is ``expected``.
    """

    start: int
    size: int
    done: Callable[[], None]
    into: memoryview | None = None
    deliver: Callable[[memoryview], None] | None = None
    lead: int = 0
    """Bytes before ``start`` that are read as well, because a checksum is of them too."""
    trail: int = 0
    """Bytes after the range, likewise."""
    to_device: bool = False
    """Whether ``deliver`` copies to a CUDA device."""
    expected: Expected | None = None
    """The chunks of everything that is read, lead and trail included, reported before ``deliver``."""

    @property
    def begin(self) -> int:
        """First byte that is read."""
        return self.start - self.lead

    @property
    def end(self) -> int:
        """The end of the read."""
        return self.start + self.size + self.trail

    @property
    def held(self) -> int:
        """Bytes of memory that it needs beyond its destination."""
        own = 0 if self.into is not None else _aligned(self.size)
        return _aligned(self.lead) + _aligned(self.trail) + own


@dataclass(frozen=True, slots=True)
class Arrival:
    """The memory for the bytes of an extent: its own range, and all that is read for it, in order."""

    start: int
    """Where its bytes begin in the request's."""
    body: memoryview
    views: tuple[memoryview, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One ranged read: extents in order of their start, with small gaps between."""

    extents: tuple[Extent, ...]

    @property
    def start(self) -> int:
        """First byte."""
        return self.extents[0].begin

    @property
    def size(self) -> int:
        """Bytes that are read."""
        return self.extents[-1].end - self.start

    @property
    def buffered(self) -> int:
        """Bytes of memory that the request needs beyond its destinations."""
        return _aligned(self.widest_gap) + sum(extent.held for extent in self.extents)

    @property
    def to_device(self) -> bool:
        """True if some of the bytes go on to a CUDA device."""
        return any(extent.to_device for extent in self.extents)

    @property
    def widest_gap(self) -> int:
        """Bytes of the largest gap between two extents."""
        return max((b.begin - a.end for a, b in zip(self.extents, self.extents[1:], strict=False)), default=0)

    def buffers(self, scratch: memoryview) -> tuple[list[memoryview], list[Arrival]]:
        """Buffers for the whole range, and for each extent where it lands.

        ``scratch`` holds at least ``buffered`` bytes. Every gap lands in the same ones.
        """
        buffers: list[memoryview] = []
        arrivals: list[Arrival] = []
        used = _aligned(self.widest_gap)

        def own(size: int) -> memoryview:
            nonlocal used
            taken = scratch[used : used + size]
            used += _aligned(size)
            return taken

        at = self.start
        for extent in self.extents:
            if extent.begin > at:
                buffers.append(scratch[: extent.begin - at])
            body = extent.into if extent.into is not None else own(extent.size)
            pieces = (own(extent.lead), body, own(extent.trail))
            views = tuple(piece for piece in pieces if piece.nbytes)
            buffers += views
            arrivals.append(Arrival(extent.begin - self.start, body, views))
            at = extent.end
        return buffers, arrivals

    def deliver(self, arrivals: Sequence[Arrival]) -> None:
        """Hand every extent its bytes, once they have arrived and are as expected."""
        try:
            for extent, arrival in zip(self.extents, arrivals, strict=True):
                if extent.deliver is not None:
                    extent.deliver(arrival.body)
        finally:
            settle()
        for extent in self.extents:
            extent.done()


def _aligned(size: int) -> int:
    return -(-size // 16) * 16


def merge(
    extents: Iterable[Extent], most: int, gap: int = GAP, longest: Callable[[], int] | None = None
) -> Iterator[Request]:
    """Group extents of one object into requests.

    Extents that follow one another within ``gap`` bytes share a request; those that overlap do not. A request
    has about ``most`` bytes; where they need no memory beyond their destinations, as many as ``longest``
    says, which is asked anew for each request.
    """
    group: list[Extent] = []
    held = limit = 0
    for extent in sorted(extents, key=lambda extent: extent.begin):
        if group:
            end = group[-1].end
            near = end <= extent.begin <= end + gap
            if not (near and extent.end - group[0].begin <= limit and held + extent.held <= most):
                yield Request(tuple(group))
                group = []
        if not group:
            held, limit = 0, most if longest is None else longest()
        group.append(extent)
        held += extent.held
    if group:
        yield Request(tuple(group))
