"""Ranged reads of many extents, side by side, within a ceiling on memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from typing import TypeVar

from cloudckpt.backends.errors import IntegrityError, ObjectNotFoundError
from cloudckpt.backends.save.uploader import Observer
from cloudckpt.backends.stores.base import Arrived, ObjectStore
from cloudckpt.backends.system.system_limits import Workers
from cloudckpt.backends.transfer.adaptive_concurrency import transfer_lanes
from cloudckpt.backends.transfer.buffer_pool import BufferPool
from cloudckpt.backends.transfer.byte_ranges import Arrival, Extent, Request, merge, nothing
from cloudckpt.backends.transfer.download_checksums import DownloadChecksums

_A = TypeVar("_A")
_B = TypeVar("_B")

_MIB = 1 << 20
LARGEST_READ = 32 << 20
_SHORTEST_READ = 8 << 20
"""Bytes of a request where there is little to read for each one in flight."""
_LONGEST_READ = 128 << 20
"""Bytes of a request that go straight to where they stay. Each request costs the processor some 2 ms."""

PassOn = Callable[[Sequence[Arrival]], None]
"""Takes what a request has read, where it landed."""
Job = tuple[str, Request, PassOn]
"""An object, what is read of it at once, and who is handed that before it is delivered."""


class Downloader:
    """Reads extents of a store's objects into their destinations.

    Args:
        store: where from.
        concurrency: requests in flight at most.
        memory_limit: bytes held beyond the destinations.
        least_sizes: bytes that an object must have; one that turns out shorter is damaged.
        largest_read: bytes that one request holds in memory; of those that go straight to their destination
            it may have more, where there is so much to read that all requests in flight have enough.
    """

    def __init__(
        self,
        store: ObjectStore,
        concurrency: int,
        memory_limit: int,
        least_sizes: Mapping[str, int],
        largest_read: int = LARGEST_READ,
    ) -> None:
        self._store = store
        self._least_sizes = least_sizes
        self._concurrency = concurrency
        self._lanes = transfer_lanes(store, "down", concurrency)
        self._scratch = BufferPool(memory_limit)
        self.observe(None, None)
        self._largest = max(1, min(largest_read, memory_limit // 2))

    def observe(self, observer: Observer | None, begun: Callable[[int], None] | None) -> None:
        """Call ``begun`` with the number of bytes of a load, and ``observer`` for each range."""
        self._observer, self._begun = observer, begun

    @property
    def largest(self) -> int:
        """Bytes that an extent should have at most."""
        return self._largest

    def expect(self, nbytes: int) -> None:
        """Say how many bytes will be read, so that each request in flight gets some of them."""
        if self._store.is_remote:
            shared_out = max(_SHORTEST_READ, nbytes // self._lanes.limit // _MIB * _MIB)
            self._largest = min(self._largest, shared_out)

    def read(
        self,
        wanted: Mapping[str, Sequence[Extent]],
        first: Sequence[Job] = (),
        give_up: Callable[[], None] = nothing,
    ) -> None:
        """Read every extent of every object; callbacks run on the threads that read.

        Args:
            wanted: extents by object; those near each other are read in one request.
            first: what to begin with.
            give_up: called at the first failure, to end what requests in flight may wait for.

        Raises:
            Exception: the first failure, once no request is in flight any more.
        """
        requests: list[tuple[str, Request, PassOn | None]] = list(first)
        requests += [(name, request, None) for name, request in self._merged(wanted)]
        if self._begun is not None:
            self._begun(sum(request.size for _, request, _ in requests))
        with Workers(self._concurrency, thread_name_prefix="cloudckpt-read") as pool:
            futures = [pool.submit(self._serve, *request) for request in requests]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:  # Ctrl-C too: a task that has not started never will
                pool.shutdown(wait=False, cancel_futures=True)
                give_up()
                raise
        self._scratch.clear()

    def _merged(self, wanted: Mapping[str, Sequence[Extent]]) -> Iterator[tuple[str, Request]]:
        """Few requests of many bytes first, and smaller ones towards the end, for which none has to wait."""
        left = sum(extent.end - extent.begin for extents in wanted.values() for extent in extents)

        def longest() -> int:
            return max(self._largest, min(_LONGEST_READ, left // self._lanes.limit))

        for name, extents in wanted.items():
            for request in merge(extents, self._largest, longest=longest):
                left -= request.size
                yield name, request

    def each(self, task: Callable[[_A], _B], arguments: Sequence[_A]) -> list[_B]:
        """Run small reads side by side; results in order."""
        with Workers(self._concurrency, thread_name_prefix="cloudckpt-read") as pool:
            return list(pool.map(task, arguments))

    def fetch(self, name: str, offset: int, size: int) -> bytes:
        """Read a few bytes at once."""
        data = bytearray(size)
        self._fill(name, offset, [memoryview(data)])
        return bytes(data)

    def _serve(self, name: str, request: Request, pass_on: PassOn | None) -> None:
        cost = request.buffered
        if cost > self._largest:  # one value, as large as the metadata says: nothing is taken on its word
            with self._damage_named(name):
                self._check_size(name, self._store.stat(name).size)
        with self._scratch.lent(cost, locked=request.to_device) as scratch:
            with self._lanes.taken(request.size):
                arrivals = self._transfer(name, request, scratch)
                if pass_on is None:
                    request.deliver(arrivals)
            if pass_on is not None:  # not in a lane: it waits for other ranks
                pass_on(arrivals)
                request.deliver(arrivals)

    def _transfer(self, name: str, request: Request, scratch: memoryview) -> list[Arrival]:
        buffers, arrivals = request.buffers(scratch)
        checking = DownloadChecksums(
            (extent.expected, arrival)
            for extent, arrival in zip(request.extents, arrivals, strict=True)
            if extent.expected is not None
        )
        self._fill(name, request.start, buffers, checking.arrived)
        checking.finish()
        if self._observer is not None:
            self._observer(name, request.size)
        return arrivals

    def _fill(
        self, name: str, offset: int, buffers: Sequence[memoryview], arrived: Arrived | None = None
    ) -> None:
        with self._damage_named(name):
            size = self._store.read_into(name, offset, buffers, arrived=arrived)
            if size is not None:
                self._check_size(name, size)

    def _check_size(self, name: str, size: int) -> None:
        if size < self._least_sizes[name]:
            raise IntegrityError(f"it has {size} bytes and should have {self._least_sizes[name]}")

    @contextlib.contextmanager
    def _damage_named(self, name: str) -> Iterator[None]:
        """Say of an object that is missing or short what that means for the checkpoint."""
        try:
            yield
        except (ObjectNotFoundError, IntegrityError) as error:
            how = "missing" if isinstance(error, ObjectNotFoundError) else "shorter than the checkpoint says"
            raise IntegrityError(
                f"a data object is {how}: {error.message}",
                uri=self._store.uri,
                object_name=name,
                hint="The checkpoint is damaged; load another step",
            ) from error


def in_reads(start: int, into: memoryview, most: int, chunk: int = 1) -> Iterator[tuple[int, memoryview]]:
    """Cut a long run into reads of at most ``most`` bytes.

    ``start`` is where the run begins in a segment whose chunks have ``chunk`` bytes; where it can be, a cut
    is between two of them, so that neither read needs bytes of the other to verify its own.
    """
    at = 0
    while at < into.nbytes:
        stop = at + most
        if stop < into.nbytes:
            aligned = stop - (start + stop) % chunk
            stop = aligned if aligned > at else stop
        yield start + at, into[at:stop]
        at = stop
