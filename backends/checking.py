"""Checksums of what a request reads, taken while the bytes that just arrived are in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cloudckpt.backends.checksum import Expected
from cloudckpt.backends.ranges import Arrival


@dataclass(slots=True)
class _Piece:
    """Bytes ``start`` to ``stop`` of a request, which lie in one chunk and in one buffer."""

    start: int
    stop: int
    memory: memoryview
    chunk: int
    of: Callable[..., int]


class Checking:
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
        ends = (arrival.start + chunk.stop - expected.chunks[0].start for chunk in expected.chunks)
        end = next(ends)
        for memory in arrival.views:
            begin, limit = start, start + memory.nbytes
            while start < limit:
                if start == end:
                    end = next(ends)
                    self._count += 1
                stop = min(limit, end)
                self._pieces.append(
                    _Piece(start, stop, memory[start - begin : stop - begin], self._count, of)
                )
                start = stop
        self._count += 1

    def _restart(self) -> None:
        self._at = 0
        self._next = 0
        self._values = [0] * self._count

    def arrived(self, count: int) -> None:
        """Take in what has come since the last call, of ``count`` bytes in all."""
        if count < self._at:
            self._restart()
        pieces, values = self._pieces, self._values
        while self._next < len(pieces) and (piece := pieces[self._next]).start < count:
            first, last = max(self._at, piece.start), min(count, piece.stop)
            memory = piece.memory[first - piece.start : last - piece.start]
            values[piece.chunk] = piece.of(memory, values[piece.chunk])
            if last < piece.stop:
                break
            self._next += 1
        self._at = count

    def finish(self) -> None:
        """Take in the rest, and tell of every extent's chunks in turn.

        Raises:
            Exception: whatever one of those who are told raises.
        """
        if self._pieces:
            self.arrived(max(self._at, self._pieces[-1].stop))
        first = 0
        for one in self._expected:
            last = first + len(one.chunks)
            one.tell(one.checks.damaged(one.chunks, self._values[first:last]))
            first = last
