"""Many buffers, taken a limited number of bytes at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def runs(buffers: Sequence[memoryview], most: int, *, uncut: int | None = None) -> Iterator[list[memoryview]]:
    """Yield the buffers in order, cut so that no list of them has more than ``most`` bytes.

    A buffer of at least ``uncut`` bytes is not cut, and comes by itself.
    """
    run: list[memoryview] = []
    room = most
    for buffer in buffers:
        if uncut is not None and buffer.nbytes >= uncut:
            if run:
                yield run
                run, room = [], most
            yield [buffer]
            continue
        start = 0
        while start < buffer.nbytes:
            piece = buffer[start : start + room]
            run.append(piece)
            start += piece.nbytes
            room -= piece.nbytes
            if not room:
                yield run
                run, room = [], most
    if run:
        yield run
