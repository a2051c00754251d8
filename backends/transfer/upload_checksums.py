"""Checksums of what a part consists of, taken while the bytes that just went out are in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cloudckpt.backends.checksums import Algorithm, Fragment, cut
from cloudckpt.backends.transfer.segments import Window


class UploadChecksums:
    """The fragments of one part.

    ``departed`` is for the store to call as it goes; what it doesn't speak of is read in ``finish``.
    """

    def __init__(self, algorithm: Algorithm, window: Window, buffers: Sequence[memoryview]) -> None:
        self._of = algorithm.of
        self._ahead = _cut(window, buffers)
        self._next = next(self._ahead, None)
        self._done = 0
        self._fragments: list[Fragment] = []

    def departed(self, count: int) -> None:
        """Take in what has gone out of the first ``count`` bytes; what went out before is not read again."""
        while self._next is not None and self._done + self._next.nbytes <= count:
            self._fragments.append(Fragment(self._next.nbytes, self._of(self._next)))
            self._done += self._next.nbytes
            self._next = next(self._ahead, None)

    def finish(self) -> list[Fragment]:
        """Take in the rest, and return all fragments in the order of the part's bytes."""
        if self._next is not None:
            self.departed(1 << 62)
        return self._fragments


def _cut(window: Window, buffers: Sequence[memoryview]) -> Iterator[memoryview]:
    for (segment, start, _), buffer in zip(window.pieces, buffers, strict=True):
        yield from cut(buffer, start, segment.nbytes)
