"""Checksums of what is stored, chunk by chunk: taken while bytes go out, compared when they come back.

Every segment of an item is cut into chunks of its own, from its first byte on. So a tensor's payload has
chunks that begin where it does, a range of it is verified without reading what surrounds it, and parts that
end in the middle of a chunk only make it the sum of two fragments. Checksums of parts and objects are
combined from those of fragments: no byte is read twice.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import crc32c
from awscrt import checksums as crt

SMALLEST_CHUNK: Final = 64 << 10
LARGEST_CHUNK: Final = 512 << 10
_CHUNKS: Final = 64
"""Chunks that a segment is cut into, within the bounds above: few bytes to keep, few to read too many."""


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
        """The checksum of fragments laid end to end."""
        value = 0
        for fragment in fragments:
            value = self._combine(value, fragment.value, fragment.nbytes)
        return value

    def packed(self, value: int) -> bytes:
        """A checksum as it is stored: big-endian."""
        return value.to_bytes(self.width, "big")

    def text(self, value: int) -> str:
        """``<name>:<base64>``, as stores take it."""
        return f"{self.name}:{base64.b64encode(self.packed(value)).decode()}"


def _crc32c(data: memoryview | bytes, before: int = 0) -> int:
    """``crc32c`` reads memory that no cache holds at twice awscrt's pace.

    It keeps the interpreter's lock: a chunk takes less time than the threads of a transfer take to hand the
    lock from one to the next.
    """
    return crc32c.crc32c(data, before, gil_release_mode=-1)


CRC64NVME: Final = Algorithm("crc64nvme", 8, crt.crc64nvme, crt.combine_crc64nvme)
CRC32C: Final = Algorithm("crc32c", 4, _crc32c, crt.combine_crc32c)
ALGORITHMS: Final = {algorithm.name: algorithm for algorithm in (CRC64NVME, CRC32C)}


def algorithm_for(store: str | None) -> Algorithm:
    """The algorithm of a save's checksums: the one that the store wants of its parts, or the cheapest.

    CRC32C is half the price where bytes are in the cache, as they are when no checksum has to go before them.
    """
    return CRC32C if store is None else ALGORITHMS[store]


@dataclass(frozen=True, slots=True)
class Fragment:
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


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes ``start`` to ``stop`` of an item, and their checksum."""

    start: int
    stop: int
    expected: bytes


@dataclass(frozen=True, slots=True)
class Checks:
    """The checksums of one item."""

    algorithm: Algorithm
    spans: tuple[int, ...]
    """Bytes of each segment of the item."""
    sums: bytes
    """The packed checksums of all chunks."""

    def covering(self, start: int, stop: int) -> list[Chunk]:
        """The chunks that hold bytes ``start`` to ``stop`` of the item."""
        found: list[Chunk] = []
        width, at, before = self.algorithm.width, 0, 0
        for span in self.spans:
            size = chunk_size(span)
            if at < stop and at + span > start:
                first = max(0, start - at) // size
                last = -(-min(span, stop - at) // size)
                for index in range(first, last):
                    where = (before + index) * width
                    end = at + min(span, (index + 1) * size)
                    found.append(Chunk(at + index * size, end, self.sums[where : where + width]))
            at += span
            before += -(-span // size)
        return found

    def with_framing(self, start: int, stop: int) -> tuple[int, int]:
        """The range, and the framing at those ends of the payload that it reaches.

        Nothing needs its bytes, but whoever reads a whole item wants to know that all of it is right.
        """
        total = sum(self.spans)
        if len(self.spans) == FRAMED:
            if start == self.spans[0]:
                start = 0
            if stop == total - self.spans[-1]:
                stop = total
        return start, stop

    def damaged(self, chunks: Sequence[Chunk], values: Sequence[int]) -> list[Chunk]:
        """Those of some chunks whose checksums, in the same order, are not as expected."""
        return [
            chunk
            for chunk, value in zip(chunks, values, strict=True)
            if self.algorithm.packed(value) != chunk.expected
        ]


@dataclass(frozen=True, slots=True)
class Expected:
    """Consecutive chunks of an item that are about to be read."""

    checks: Checks
    chunks: Sequence[Chunk]
    tell: Callable[[list[Chunk]], None]
    """Called once all have been read, with those that are damaged."""


def count_chunks(spans: Iterable[int]) -> int:
    """How many chunks segments of so many bytes are cut into."""
    return sum(-(-span // chunk_size(span)) for span in spans)


def is_consistent(checks: Checks, length: int) -> bool:
    """Whether checksums read from somewhere can be those of an item of ``length`` bytes."""
    return (
        all(span >= 0 for span in checks.spans)
        and sum(checks.spans) == length
        and len(checks.sums) == count_chunks(checks.spans) * checks.algorithm.width
    )
