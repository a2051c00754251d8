"""The assignment of reads that the ranks of one host have in common: one rank does each.

Every rank offers the ranges that it is about to read. Those that several ranks would read are joined where
they follow one another, and shared out by bytes; one rank reads each and passes it on to the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cloudckpt.backends.transfer.byte_ranges import GAP

_REQUEST = 1 << 20
"""Bytes that a request costs as much as, when reads are shared out."""

Range = tuple[int, int]
"""First byte in an object, and where it ends."""


@dataclass(frozen=True, slots=True)
class Offer:
    """The reads that a rank is about to do."""

    ranges: Mapping[str, Sequence[Range]]
    """By object: ranges that the rank could have from another, each of them once."""
    rest: int
    """Bytes that it reads besides, in any case."""
    most: int
    """Bytes that it may read at once for others."""


@dataclass(frozen=True, slots=True)
class Task:
    """Ranges of one object that one rank reads for several, itself among them.

    They are in order, do not overlap, and have small gaps between them.
    """

    name: str
    ranges: tuple[Range, ...]
    ranks: tuple[int, ...]
    reader: int


def tasks_of(offers: Mapping[int, Offer]) -> list[Task]:
    """Share out what several ranks offer, joined to tasks as large as all of them can do with."""
    most = min(offer.most for offer in offers.values())
    wanted: defaultdict[str, defaultdict[Range, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, offer in offers.items():
        for name, ranges in offer.ranges.items():
            of_object = wanted[name]
            for one in ranges:
                of_object[one].append(rank)
    load = {rank: offer.rest for rank, offer in offers.items()}
    tasks: list[Task] = []
    for name, by_range in sorted(wanted.items()):
        for ranges, ranks in _joined(by_range, most):
            reader = min(ranks, key=lambda rank: (load[rank], rank))
            load[reader] += _REQUEST + sum(stop - start for start, stop in ranges)
            tasks.append(Task(name, ranges, ranks, reader))
    return tasks


def _joined(
    by_range: Mapping[Range, Sequence[int]], most: int
) -> Iterator[tuple[tuple[Range, ...], tuple[int, ...]]]:
    """Join neighbours that the same ranks want."""
    held: list[Range] = []
    holders: tuple[int, ...] = ()
    for one in sorted(by_range):
        ranks = tuple(by_range[one])
        if len(ranks) == 1:
            continue
        near = held and ranks == holders and held[-1][1] <= one[0] <= held[-1][1] + GAP
        if held and not (near and one[1] - held[0][0] <= most):
            yield tuple(held), holders
            held = []
        holders = ranks
        held.append(one)
    if held:
        yield tuple(held), holders
