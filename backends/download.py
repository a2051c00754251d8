"""Ranged reads of many extents, side by side, within a ceiling on memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from cloudckpt.backends.budget import Budget
from cloudckpt.backends.errors import CheckpointError, IntegrityError, ObjectNotFoundError
from cloudckpt.backends.ranges import Extent, Request, merge
from cloudckpt.backends.segments import bytes_of
from cloudckpt.backends.store import ObjectStore

_A = TypeVar("_A")
_B = TypeVar("_B")

LARGEST_READ = 32 << 20
"""Bytes of one request; longer runs are cut, so that they arrive side by side."""


class Downloader:
    """Reads extents of a store's objects into their destinations.

    Args:
        store: where from.
        concurrency: requests in flight.
        memory_limit: bytes held beyond the destinations.
    """

    def __init__(self, store: ObjectStore, concurrency: int, memory_limit: int) -> None:
        self._store = store
        self._concurrency = concurrency
        self._budget = Budget(memory_limit)
        self._largest = max(1, min(LARGEST_READ, memory_limit // 2))

    @property
    def largest(self) -> int:
        """Bytes that an extent without a destination of its own should have at most."""
        return self._largest

    def read(self, wanted: Mapping[str, Sequence[Extent]]) -> None:
        """Read every extent of every object; callbacks run on the threads that read.

        Raises:
            Exception: the first failure, once no request is in flight any more.
        """
        requests = [
            (name, request) for name, extents in wanted.items() for request in merge(extents, self._largest)
        ]
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="cloudckpt-read") as pool:
            futures = [pool.submit(self._serve, name, request) for name, request in requests]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                if (error := future.exception()) is not None:
                    pool.shutdown(cancel_futures=True)
                    raise error

    def each(self, task: Callable[[_A], _B], arguments: Sequence[_A]) -> list[_B]:
        """Run small reads side by side; results in order."""
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="cloudckpt-read") as pool:
            return list(pool.map(task, arguments))

    def fetch(self, name: str, offset: int, size: int) -> bytes:
        """Read a few bytes at once."""
        data = bytearray(size)
        self._fill(name, offset, [memoryview(data)])
        return bytes(data)

    def _serve(self, name: str, request: Request) -> None:
        cost = request.buffered
        self._budget.admit(cost)
        try:
            scratch = bytes_of(torch.empty(cost, dtype=torch.uint8)) if cost else memoryview(b"")
            buffers, given = request.buffers(scratch)
            self._fill(name, request.start, buffers)
            for extent, own in zip(request.extents, given, strict=True):
                if extent.deliver is not None and own is not None:
                    extent.deliver(own)
                extent.done()
        finally:
            self._budget.release(cost)

    def _fill(self, name: str, offset: int, buffers: Sequence[memoryview]) -> None:
        try:
            self._store.read_into(name, offset, buffers)
        except ObjectNotFoundError as error:
            raise _damaged(error, self._store.uri, name, "is missing") from error
        except IntegrityError as error:
            raise _damaged(error, self._store.uri, name, "is shorter than the checkpoint says") from error


def _damaged(error: CheckpointError, uri: str, name: str, how: str) -> IntegrityError:
    return IntegrityError(
        f"a data object {how}: {error.message}",
        uri=uri,
        object_name=name,
        hint="The checkpoint is damaged; load another step",
    )


def in_reads(start: int, into: memoryview, most: int) -> Iterable[tuple[int, memoryview]]:
    """Cut a long run into reads of at most ``most`` bytes."""
    for at in range(0, into.nbytes, most):
        yield start + at, into[at : at + most]
