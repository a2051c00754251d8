"""Checksums of an object that passes through part by part, compared with those that it was saved with.

Parts end where they must, chunks where their items do. What a part has of a chunk that goes on in another
part is kept as an edge, a few bytes, until both ends have passed. So no byte is read twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch.distributed.checkpoint.metadata import Metadata

from cloudckpt.backends.checksums import Algorithm, Checks, Fragment
from cloudckpt.backends.errors import IntegrityError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.torch_private import StorageInfo

Edge = tuple[int, int, int]
"""Where in the object some bytes of a chunk begin, how many they are, and their checksum."""


@dataclass(frozen=True, slots=True)
class _Item:
    start: int
    stop: int
    fqn: str
    checks: Checks


@dataclass(frozen=True, slots=True)
class _Located:
    """A chunk, by where it lies in the object."""

    start: int
    stop: int
    expected: bytes
    fqn: str


class ObjectChecks:
    """Checksums of one object's bytes from the metadata; none where a stock writer wrote it."""

    def __init__(self, uri: str, name: str, items: Iterable[_Item], algorithm: Algorithm | None) -> None:
        self._uri = uri
        self._name = name
        self._items = sorted(items, key=lambda item: item.start)
        self._reach = list(accumulate((item.stop for item in self._items), max))
        self.algorithm = algorithm

    def chunks(self, start: int, stop: int) -> list[_Located]:
        """Return the chunks that have some of the object's bytes ``start`` to ``stop``."""
        found: list[_Located] = []
        for index in range(bisect_right(self._reach, start), len(self._items)):
            item = self._items[index]
            if item.start >= stop:
                break
            if item.stop > start:
                found += [
                    _Located(item.start + chunk.start, item.start + chunk.stop, chunk.expected, item.fqn)
                    for chunk in item.checks.covering(max(0, start - item.start), stop - item.start)
                ]
        return found

    def edges(self, start: int, stop: int) -> set[tuple[int, int]]:
        """Return the first byte and the number of bytes of each chunk that a part has only in part."""
        pieces = ((one, _cut(one, start, stop)) for one in self.chunks(start, stop))
        return {
            (first, last - first) for one, (first, last) in pieces if (first, last) != (one.start, one.stop)
        }

    def compare_across(self, borders: Sequence[int], edges: Mapping[tuple[int, int], int]) -> None:
        """Compare the chunks that lie in several parts, from the ``edges`` of all of them.

        ``borders`` are the beginnings of all parts but the first, in order.

        Raises:
            IntegrityError: one is damaged.
        """
        if self.algorithm is None:
            return
        for index, border in enumerate(borders):
            for chunk in self.chunks(border - 1, border + 1):
                first = index == 0 or borders[index - 1] <= chunk.start
                if not chunk.start < border < chunk.stop or not first:
                    continue
                inside = borders[index : bisect_right(borders, chunk.stop - 1)]
                cuts = [chunk.start, *inside, chunk.stop]
                held = [Fragment(end - begin, edges[begin, end - begin]) for begin, end in pairwise(cuts)]
                self.compare(chunk, self.algorithm.combine(held))

    def compare(self, chunk: _Located, value: int) -> None:
        """Refuse a chunk with another checksum.

        Raises:
            IntegrityError: it is damaged.
        """
        if self.algorithm is not None and self.algorithm.packed(value) != chunk.expected:
            raise IntegrityError(
                f"{chunk.fqn!r} is damaged: bytes {chunk.start} to {chunk.stop} of the object are not those "
                "that were saved",
                uri=self._uri,
                object_name=self._name,
                hint="It was not copied; `cloudckpt verify` lists all that is damaged: copy another step",
            )


class Passing:
    """One part: ``arrived`` is for the store to call while it is read, and ``finish`` compares it.

    Args:
        checks: of the object.
        offset: where the part begins.
        buffer: its bytes, as soon as they have arrived.
    """

    def __init__(self, checks: ObjectChecks, offset: int, buffer: memoryview) -> None:
        self._checks = checks
        self._offset = offset
        self._buffer = buffer
        end = offset + buffer.nbytes
        cut = ((one, *_cut(one, offset, end)) for one in checks.chunks(offset, end))
        self._pieces = sorted(cut, key=lambda piece: piece[2])
        self._values: list[int] = []
        self._count = 0

    def arrived(self, count: int) -> None:
        """Take in what is there of the first ``count`` bytes; fewer than before, and the read starts over."""
        if count < self._count:
            self._values.clear()
        self._count = count
        algorithm = self._checks.algorithm
        while algorithm is not None and len(self._values) < len(self._pieces):
            _, start, stop = self._pieces[len(self._values)]
            if stop - self._offset > count:
                return
            self._values.append(algorithm.of(self._buffer[start - self._offset : stop - self._offset]))

    def finish(self) -> None:
        """Compare the chunks that lie in this part, all of which has arrived.

        Raises:
            IntegrityError: one is damaged.
        """
        self.arrived(max(self._count, self._buffer.nbytes))
        for (chunk, start, stop), value in zip(self._pieces, self._values, strict=True):
            if (start, stop) == (chunk.start, chunk.stop):
                self._checks.compare(chunk, value)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Return the checksums of chunks that go on in other parts, once the part is finished."""
        return tuple(
            (start, stop - start, value)
            for (chunk, start, stop), value in zip(self._pieces, self._values, strict=True)
            if (start, stop) != (chunk.start, chunk.stop)
        )

    def checksum(self, algorithm: Algorithm) -> int:
        """Return the checksum of the whole part, from its chunks where they have this algorithm."""
        at = self._offset
        for _, start, stop in self._pieces:
            if start != at:
                break
            at = stop
        if algorithm is self._checks.algorithm and at == self._offset + self._buffer.nbytes:
            sizes = (stop - start for _, start, stop in self._pieces)
            return algorithm.combine(map(Fragment, sizes, self._values))
        return algorithm.of(self._buffer)


def checks_of(metadatas: Iterable[Metadata], uri: str) -> dict[str, ObjectChecks]:
    """Return the checksums of each object that metadata names, of all ranks or of each."""
    items: dict[str, list[_Item]] = {}
    algorithms: dict[str, Algorithm] = {}
    for metadata in metadatas:
        known = md.algorithms_of(metadata)
        algorithms |= known
        for index, info in metadata.storage_data.items():
            held = items.setdefault(info.relative_path, [])
            checks = md.checks_of(info, known)
            if checks is not None and info.length:
                held.append(_located(index.fqn, info, checks))
    return {name: ObjectChecks(uri, name, held, algorithms.get(name)) for name, held in items.items()}


def _located(fqn: str, info: StorageInfo, checks: Checks) -> _Item:
    return _Item(info.offset, info.offset + info.length, fqn, checks)


def _cut(chunk: _Located, start: int, stop: int) -> tuple[int, int]:
    return max(chunk.start, start), min(chunk.stop, stop)
