"""Checksums of what is stored, chunk by chunk: taken while bytes go out, compared when they come back.

Every segment of an item is cut into chunks of its own, from its first byte on. So a tensor's payload has
chunks that begin where it does, a range of it is verified without reading what surrounds it, and parts that
end in the middle of a chunk only make it the sum of two fragments. Checksums of parts and objects are
combined from those of fragments: no byte is read twice.
"""

from __future__ import annotations

import base64
import functools
import itertools
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

import crc32c
from awscrt import checksums as crt

SMALLEST_CHUNK: Final = 64 << 10
LARGEST_CHUNK: Final = 512 << 10
_CHUNKS: Final = 64
"""Chunks that a segment is cut into, within the bounds above: few bytes to keep, few to read too many."""


_CODES: Final = {4: "I", 8: "Q"}
"""Of checksums by their width, as `struct` has them."""
FRAMED: Final = 3
"""Segments of an item that holds a payload: what comes before it, itself, what comes after."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A CRC that can be combined."""

    name: str
    width: int
    """Bytes of a checksum."""
    of: Callable[..., int]
    """``of(data, before=0)``: the checksum of ``data``, going on from that of what comes before it."""
    _combine: Callable[[int, int, int], int]

    def combine(self, fragments: Iterable[Fragment]) -> int:
        """Return the checksum of fragments laid end to end."""
        value = 0
        for fragment in fragments:
            value = self._combine(value, fragment.value, fragment.nbytes)
        return value

    def packed(self, value: int) -> bytes:
        """Return a checksum as it is stored: big-endian."""
        return value.to_bytes(self.width, "big")

    def packed_all(self, values: Sequence[int]) -> bytes:
        """Several, end to end."""
        return struct.pack(f">{len(values)}{_CODES[self.width]}", *values)

    def text(self, value: int) -> str:
        """``<name>:<base64>``, as stores take it."""
        return f"{self.name}:{base64.b64encode(self.packed(value)).decode()}"


CRC64NVME: Final = Algorithm("crc64nvme", 8, crt.crc64nvme, crt.combine_crc64nvme)
# `crc32c` reads memory that no cache holds at twice awscrt's pace. It keeps the interpreter's lock: a chunk
# takes less time than the threads of a transfer take to hand the lock from one to the next.
CRC32C: Final = Algorithm(
    "crc32c", 4, functools.partial(crc32c.crc32c, gil_release_mode=-1), crt.combine_crc32c
)
ALGORITHMS: Final = {algorithm.name: algorithm for algorithm in (CRC64NVME, CRC32C)}


def algorithm_for(store: str | None) -> Algorithm:
    """Return the algorithm of a save's checksums: the one that the store wants of its parts, or the cheapest.

    CRC32C is half the price where bytes are in the cache, as they are when no checksum has to go before them.
    """
    return CRC32C if store is None else ALGORITHMS[store]


class Fragment(NamedTuple):
    """Some consecutive bytes that lie in one chunk."""

    nbytes: int
    value: int


def chunk_size(nbytes: int) -> int:
    """Bytes of each chunk of a segment but the last. Part of the format: it must never change."""
    if nbytes <= _CHUNKS * SMALLEST_CHUNK:
        return SMALLEST_CHUNK
    wanted = 1 << max(0, -(-nbytes // _CHUNKS) - 1).bit_length()
    return min(LARGEST_CHUNK, max(SMALLEST_CHUNK, wanted))


def cut(buffer: memoryview, start: int, segment_size: int) -> Iterator[memoryview]:
    """Cut a window on a segment at the borders of chunks; ``buffer`` holds its bytes from ``start`` on."""
    chunk = chunk_size(segment_size)
    at = 0
    while at < buffer.nbytes:
        stop = min(buffer.nbytes, at + chunk - (start + at) % chunk)
        yield buffer[at:stop]
        at = stop


def joined(algorithm: Algorithm, spans: Iterable[int], fragments: Iterable[Fragment]) -> Iterator[bytes]:
    """For each segment, of so many bytes, the packed checksums of its chunks."""
    coming = iter(fragments)
    for span in spans:
        packed = bytearray()
        chunk, left = chunk_size(span), span
        while left:
            wanted, held = min(chunk, left), []
            while wanted:
                fragment = next(coming)
                held.append(fragment)
                wanted -= fragment.nbytes
                left -= fragment.nbytes
            packed += algorithm.packed(held[0].value if len(held) == 1 else algorithm.combine(held))
        yield bytes(packed)


class Chunk(NamedTuple):
    """Bytes ``start`` to ``stop`` of an item, and their checksum."""

    start: int
    stop: int
    expected: bytes


@dataclass(frozen=True, slots=True)
class Chunks:
    """Consecutive chunks of one segment of an item: ``size`` bytes each, but for the last.

    They are reported together: each call for one of them would be made for every half MiB that is read.
    """

    start: int
    stop: int
    size: int
    sums: bytes
    """Their packed checksums."""

    def __len__(self) -> int:
        return (self.stop - self.start + self.size - 1) // self.size

    @property
    def _width(self) -> int:
        return len(self.sums) // len(self)

    def each(self) -> Iterator[Chunk]:
        """Every one of them."""
        width = self._width
        for index, start in enumerate(range(self.start, self.stop, self.size)):
            own = self.sums[index * width : (index + 1) * width]
            yield Chunk(start, min(self.stop, start + self.size), own)

    def parted(self, room: int) -> tuple[Self | None, Self | None]:
        """As many of them as fit into so many bytes, and the others."""
        count = len(self) if self.stop - self.start <= room else max(0, room) // self.size
        if count in (0, len(self)):
            return (None, self) if not count else (self, None)
        cut, border = count * self._width, self.start + count * self.size
        first, last = self.sums[:cut], self.sums[cut:]
        kind = type(self)
        return kind(self.start, border, self.size, first), kind(border, self.stop, self.size, last)


@dataclass(frozen=True, slots=True)
class Checks:
    """The checksums of one item."""

    algorithm: Algorithm
    spans: tuple[int, ...]
    """Bytes of each segment of the item."""
    sums: bytes
    """The packed checksums of all chunks."""

    def chunks(self, start: int, stop: int) -> list[Chunks]:
        """Return the chunks that hold bytes ``start`` to ``stop`` of the item, segment by segment."""
        found: list[Chunks] = []
        width, at, before = self.algorithm.width, 0, 0
        for span in self.spans:
            size = chunk_size(span)
            if at < stop and at + span > start and span:
                first = max(0, start - at) // size
                last = -(-min(span, stop - at) // size)
                sums = self.sums[(before + first) * width : (before + last) * width]
                found.append(Chunks(at + first * size, at + min(span, last * size), size, sums))
            at += span
            before += -(-span // size)
        return found

    def covering(self, start: int, stop: int) -> list[Chunk]:
        """Return the same, one by one."""
        return [chunk for chunks in self.chunks(start, stop) for chunk in chunks.each()]

    def with_framing(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range, and the framing at those ends of the payload that it reaches.

        Nothing needs its bytes, but a reader of a whole item expects that all of it is verified.
        """
        total = sum(self.spans)
        if len(self.spans) == FRAMED:
            if start == self.spans[0]:
                start = 0
            if stop == total - self.spans[-1]:
                stop = total
        return start, stop

    def damaged(self, chunks: Sequence[Chunks], values: Sequence[int]) -> list[Chunk]:
        """Return the chunks whose checksums, in the same order, are not as expected."""
        if self.algorithm.packed_all(values) == b"".join(each.sums for each in chunks):
            return []
        each = itertools.chain.from_iterable(one.each() for one in chunks)
        pairs = zip(each, values, strict=True)
        return [chunk for chunk, value in pairs if self.algorithm.packed(value) != chunk.expected]


@dataclass(frozen=True, slots=True)
class Expected:
    """Consecutive chunks of an item that are about to be read."""

    checks: Checks
    chunks: Sequence[Chunks]
    tell: Callable[[list[Chunk]], None]
    """Called once all have been read, with those that are damaged."""


def count_chunks(spans: Iterable[int]) -> int:
    """Return the number of chunks of segments of these sizes."""
    return sum(-(-span // chunk_size(span)) for span in spans)


def is_consistent(checks: Checks, length: int) -> bool:
    """Return True if checksums that were read can be those of an item of ``length`` bytes."""
    return (
        all(span >= 0 for span in checks.spans)
        and sum(checks.spans) == length
        and len(checks.sums) == count_chunks(checks.spans) * checks.algorithm.width
    )
