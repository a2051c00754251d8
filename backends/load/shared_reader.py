"""Reading together: each rank of a host reads a share of what several need, and passes it on.

It saves reads and is never needed: bytes that don't come from another rank as they were saved, this one reads
by itself.
"""

from __future__ import annotations

import contextlib
import functools
import struct
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cloudckpt.backends.checksums import LARGEST_CHUNK
from cloudckpt.backends.errors import IntegrityError
from cloudckpt.backends.load.peer_transport import (
    LostPeerError,
    PeerAddress,
    PeerConnection,
    PeerListener,
    Purpose,
    call,
)
from cloudckpt.backends.load.read_assignment import Offer, Task, tasks_of
from cloudckpt.backends.system import background_log
from cloudckpt.backends.system.system_limits import Workers
from cloudckpt.backends.transfer.buffer_pool import BufferPool
from cloudckpt.backends.transfer.byte_ranges import GAP, Arrival, Extent, Request
from cloudckpt.backends.transfer.download_checksums import DownloadChecksums
from cloudckpt.backends.transfer.downloader import LARGEST_READ, Downloader, Job

_log = background_log.logger(__name__)

_NUMBER = struct.Struct("@Q")
_LEADER = 0
_MEETING = 10.0
"""Seconds at most that ranks wait for each other; a rank that is later reads alone."""
_EXTENTS = 256
"""That are received at once, at most."""
_MARGIN = 2 * LARGEST_CHUNK + GAP
"""Bytes that checksums and gaps may add to a piece."""
_LEAST_PIECE = 2 << 20
"""Bytes of a piece below which reading together makes more requests than it saves."""

_Key = tuple[str, int, int]
"""An object, and the range of it that is read for an extent."""


@dataclass(frozen=True, slots=True)
class PeerGroup:
    """The ranks of a load that share their reads, and which of them this is; travels in its plan."""

    own: int
    doors: tuple[PeerAddress, ...]

    @property
    def others(self) -> list[int]:
        """All but this one."""
        return [rank for rank in range(len(self.doors)) if rank != self.own]


@dataclass(slots=True)
class _Missing:
    """The pieces of a task of another rank that have not arrived yet."""

    name: str
    extents: list[Extent]


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """The way to a rank that takes what this one reads; one thread at a time."""

    link: PeerConnection
    lock: threading.Lock = field(default_factory=threading.Lock)


def _compare(extent: Extent, arrival: Arrival) -> None:
    """Compare what came with its checksums: the other rank may have overwritten it since it was read."""
    if extent.expected is not None:
        try:
            DownloadChecksums([(extent.expected, replace(arrival, start=0))]).finish()
        except IntegrityError as error:
            raise LostPeerError("what it passed on is not what was saved") from error


def circles(doors: Sequence[PeerAddress | None]) -> list[PeerGroup | None]:
    """For each rank of a load the circle of those that it can reach; None where it would be alone."""
    found: list[PeerGroup | None] = [None] * len(doors)
    hosts: defaultdict[str, list[tuple[int, PeerAddress]]] = defaultdict(list)
    for rank, door in enumerate(doors):
        if door is not None:
            hosts[door.host].append((rank, door))
    for members in hosts.values():
        least = min(door.memory_limit for _, door in members)
        if len(members) > 1 and _largest_piece(least, len(members)) >= _LEAST_PIECE:
            inside = tuple(door for _, door in members)
            for own, (rank, _) in enumerate(members):
                found[rank] = PeerGroup(own, inside)
    return found


def _room(memory_limit: int, ranks: int) -> int:
    """Bytes for what comes from one other rank: half of all is for them, so that none waits for another."""
    return memory_limit // 2 // (ranks - 1)


def _largest_piece(memory_limit: int, ranks: int) -> int:
    # It also has to fit into the other half twice, where it is read.
    return min(LARGEST_READ, memory_limit // 4, _room(memory_limit, ranks)) - _MARGIN


def _offer(known: Iterable[_Key], rest: Mapping[str, Sequence[Extent]], most: int) -> Offer:
    ranges: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, start, stop in known:
        ranges[name].append((start, stop))
    alone = sum(extent.end - extent.begin for extents in rest.values() for extent in extents)
    return Offer(ranges, alone, most)


class SharedReads:
    """One rank's side of reading together.

    Args:
        circle: the ranks.
        listener: where the others find this one.
        memory_limit: bytes held beyond the destinations; half for what comes from other ranks.
        patience: seconds after which another rank that says nothing counts as lost.
    """

    def __init__(self, circle: PeerGroup, listener: PeerListener, memory_limit: int, patience: float) -> None:
        self._circle = circle
        self._listener = listener
        self._patience = patience
        self._meeting = min(_MEETING, patience / 2)
        self.memory_limit = memory_limit // 2
        """Bytes for what this rank reads by itself."""
        self._room = _room(memory_limit, len(circle.doors))
        self._scratch = BufferPool(self.memory_limit)
        self.largest_piece = max(1, _largest_piece(memory_limit, len(circle.doors)))
        """Bytes that are read through a buffer at once."""
        self._outgoing: dict[int, _Outgoing] = {}

    def read(self, downloader: Downloader, wanted: Mapping[str, Sequence[Extent]]) -> None:
        """Read every extent of every object, or have it from another rank; callbacks run on many threads.

        Raises:
            Exception: the first failure of this rank, once nothing is in flight any more.
        """
        known, rest = self._known(wanted)
        jobs: list[Job] = []
        takers: set[int] = set()
        missing: defaultdict[int, dict[int, _Missing]] = defaultdict(dict)
        for number, task in enumerate(self._agreed(_offer(known, rest, self.largest_piece))):
            if self._circle.own not in task.ranks:
                continue
            extents = [known.pop((task.name, *one)) for one in task.ranges]
            if task.reader == self._circle.own:
                takers.update(rank for rank in task.ranks if rank != self._circle.own)
                pass_on = functools.partial(self._pass_on, number, task.ranks)
                jobs.append((task.name, Request(tuple(extents)), pass_on))
            else:
                missing[task.reader][number] = _Missing(task.name, extents)
        for (name, _, _), extent in known.items():
            rest[name].append(extent)
        with Workers(len(missing) or 1, "cloudckpt-peer") as pool, contextlib.ExitStack() as links:
            taking = [
                pool.submit(self._take, rank, links.enter_context(link), of_rank)
                for rank, of_rank in missing.items()
                if (link := self._called(rank)) is not None
            ]
            for rank, link in self._come(Purpose.BYTES, takers).items():
                link.bound(self._patience / 2)  # a rank that waits for the next bytes must not give up, too
                self._outgoing[rank] = _Outgoing(links.enter_context(link))
            downloader.read(rest, jobs, links.close)
            for one in taking:
                one.result()
        self._scratch.clear()
        left: defaultdict[str, list[Extent]] = defaultdict(list)
        for of_rank in missing.values():
            for task_left in of_rank.values():
                left[task_left.name] += task_left.extents
        downloader.read(left)

    def _known(
        self, wanted: Mapping[str, Sequence[Extent]]
    ) -> tuple[dict[_Key, Extent], defaultdict[str, list[Extent]]]:
        """Return the extents that this rank could get from another, and those that it reads in any case."""
        known: dict[_Key, Extent] = {}
        rest: defaultdict[str, list[Extent]] = defaultdict(list)
        for name, extents in wanted.items():
            for extent in extents:
                key = (name, extent.begin, extent.end)
                # Bytes without a checksum can't be distinguished from those of another rank in the same
                # memory.
                alone = extent.expected is None or Request((extent,)).buffered > self._room
                if alone or key in known:
                    rest[name].append(extent)
                else:
                    known[key] = extent
        return known, rest

    def _agreed(self, offer: Offer) -> list[Task]:
        """Find out with the others what is read together; nothing, where they can't be reached."""
        if self._circle.own == _LEADER:
            return self._lead(offer)
        try:
            with self._call(_LEADER, Purpose.PLAN) as leader:
                leader.bound(2 * self._meeting)
                leader.say(offer)
                tasks: list[Task] = leader.hear()
        except LostPeerError as lost:
            self._lost(_LEADER, lost)
            return []
        return tasks

    def _lead(self, offer: Offer) -> list[Task]:
        offers = {self._circle.own: offer}
        with contextlib.ExitStack() as stack:
            links = self._come(Purpose.PLAN, self._circle.others)
            for link in links.values():
                link.bound(self._meeting / 2)
                stack.enter_context(link)
            for rank, link in sorted(links.items()):
                with self._losing(rank):
                    offers[rank] = link.hear()
            tasks = tasks_of(offers)
            for rank in offers.keys() - {self._circle.own}:
                with self._losing(rank):
                    links[rank].say(tasks)
        return tasks

    def _come(self, purpose: Purpose, ranks: Collection[int]) -> dict[int, PeerConnection]:
        """Return connections from other ranks, as far as they come in time."""
        links = self._listener.expect(purpose, ranks, self._meeting, self._patience)
        for rank in ranks:
            if rank not in links:
                self._lost(rank, LostPeerError(f"it did not call within {self._meeting:g} s"))
        return links

    def _call(self, rank: int, purpose: Purpose) -> PeerConnection:
        return call(self._circle.doors[rank], purpose, self._circle.own, self._patience)

    def _called(self, rank: int) -> PeerConnection | None:
        """Return a connection to a rank that passes on what it reads."""
        try:
            return self._call(rank, Purpose.BYTES)
        except LostPeerError as lost:
            self._lost(rank, lost)
            return None

    def _take(self, rank: int, link: PeerConnection, missing: dict[int, _Missing]) -> None:
        """Take from another rank what it has read, until nothing is missing or it is lost."""
        with self._losing(rank), link:
            while missing:
                head = bytearray(_NUMBER.size)
                link.fill([memoryview(head)])
                (number,) = _NUMBER.unpack(head)
                if number not in missing:
                    raise LostPeerError(f"it passes on task {number}, which is none")
                extents = missing[number].extents
                while extents:
                    batch = self._batch(extents)
                    self._receive(link, batch)
                    del extents[: len(batch.extents)]
                del missing[number]

    def _batch(self, extents: Sequence[Extent]) -> Request:
        """As many extents as may be received at once."""
        batch = Request(tuple(extents[:_EXTENTS]))
        count = len(batch.extents)
        while count > 1 and batch.buffered > self._room:
            count = (count + 1) // 2
            batch = Request(tuple(extents[:count]))
        return batch

    def _receive(self, link: PeerConnection, batch: Request) -> None:
        with self._scratch.lent(batch.buffered, locked=batch.to_device) as scratch:
            _, arrivals = batch.buffers(scratch)
            link.fill([view for arrival in arrivals for view in arrival.views])
            for extent, arrival in zip(batch.extents, arrivals, strict=True):
                _compare(extent, arrival)
            batch.deliver(arrivals)

    def _pass_on(self, number: int, ranks: Sequence[int], arrivals: Sequence[Arrival]) -> None:
        """Give the others what this rank has read for a task."""
        views = [view for arrival in arrivals for view in arrival.views]
        reached = [(rank, outgoing) for rank in ranks if (outgoing := self._outgoing.get(rank)) is not None]
        for rank, outgoing in sorted(reached, key=lambda one: one[1].lock.locked()):
            with self._losing(rank), outgoing.lock:
                if rank not in self._outgoing:
                    continue
                try:
                    outgoing.link.send([memoryview(_NUMBER.pack(number)), *views])
                except LostPeerError:
                    self._outgoing.pop(rank, None)
                    outgoing.link.close()
                    raise

    @contextlib.contextmanager
    def _losing(self, rank: int) -> Iterator[None]:
        try:
            yield
        except LostPeerError as lost:
            self._lost(rank, lost)

    def _lost(self, rank: int, lost: LostPeerError) -> None:
        _log.warning("goes on without number %d of the ranks that share reads on this host: %s", rank, lost)
