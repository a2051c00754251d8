"""Checksums of what a request reads, taken while the bytes that just arrived are in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cloudckpt.backends.checksums import Expected
from cloudckpt.backends.transfer.byte_ranges import Arrival


@dataclass(slots=True)
class _Piece:
    """Bytes ``start`` to ``stop`` of a request, which lie in one buffer and in chunks of one size."""

    start: int
    stop: int
    memory: memoryview
    origin: int
    """Where the first of these chunks begins in the request."""
    size: int
    first: int
    """The number of that chunk among all of the request."""
    of: Callable[..., int]


class DownloadChecksums:
    """Compares the chunks of one request with what is expected of them.

    ``arrived`` is for the store to call as it goes; what it doesn't speak of is read once more in ``finish``.
    """

    def __init__(self, expected: Iterable[tuple[Expected, Arrival]]) -> None:
        self._expected: list[Expected] = []
        self._pieces: list[_Piece] = []
        self._count = 0
        for one, arrival in expected:
            self._expected.append(one)
            self._cut(one, arrival)
        self._restart()

    def _cut(self, expected: Expected, arrival: Arrival) -> None:
        start, of = arrival.start, expected.checks.algorithm.of
        shift = start - expected.chunks[0].start
        coming = iter(expected.chunks)
        chunks = next(coming)
        for memory in arrival.views:
            begin, limit = start, start + memory.nbytes
            while start < limit:
                if start == chunks.stop + shift:
                    self._count += len(chunks)
                    chunks = next(coming)
                stop = min(limit, chunks.stop + shift)
                own, origin = memory[start - begin : stop - begin], chunks.start + shift
                self._pieces.append(_Piece(start, stop, own, origin, chunks.size, self._count, of))
                start = stop
        self._count += len(chunks)

    def _restart(self) -> None:
        self._at = 0
        self._next = 0
        self._values = [0] * self._count

    def arrived(self, count: int) -> None:
        """Take in what has come since the last call, of ``count`` bytes in all."""
        if count < self._at:
            self._restart()
        pieces = self._pieces
        while self._next < len(pieces) and (piece := pieces[self._next]).start < count:
            self._take(piece, max(self._at, piece.start), min(count, piece.stop))
            if count < piece.stop:
                break
            self._next += 1
        self._at = count

    def _take(self, piece: _Piece, at: int, stop: int) -> None:
        """Go on with the checksums of a piece's chunks."""
        values, of, memory, start = self._values, piece.of, piece.memory, piece.start
        whole = (at - piece.origin) // piece.size
        chunk, border = piece.first + whole, piece.origin + (whole + 1) * piece.size
        while at < stop:
            end = min(border, stop)
            values[chunk] = of(memory[at - start : end - start], values[chunk])
            at, chunk, border = end, chunk + 1, border + piece.size

    def finish(self) -> None:
        """Take in the rest, and tell of every extent's chunks in turn.

        Raises:
            Exception: a callback's own.
        """
        if self._pieces:
            self.arrived(max(self._at, self._pieces[-1].stop))
        first = 0
        for one in self._expected:
            last = first + sum(map(len, one.chunks))
            one.tell(one.checks.damaged(one.chunks, self._values[first:last]))
            first = last
