"""Phase one of a save: a rank's objects go up in parts, and every upload stays open.

Parts of all objects share one pool of requests (``concurrency``) and one ceiling on memory
(``memory_limit``). The caller's thread makes the parts, so a planner is never called from two threads; it
runs ahead of the requests by at most as many parts as there are requests, so that what a planner makes for
a part lives only until the part is sent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Final

from cloudckpt.backends.checksums import Fragment, algorithm_for
from cloudckpt.backends.stores.base import ObjectStore, Part, Upload
from cloudckpt.backends.system.system_limits import Workers
from cloudckpt.backends.transfer.adaptive_concurrency import transfer_lanes
from cloudckpt.backends.transfer.buffer_pool import BufferPool
from cloudckpt.backends.transfer.memory_budget import MemoryBudget
from cloudckpt.backends.transfer.segments import Segment, View, Window, windows
from cloudckpt.backends.transfer.upload_checksums import UploadChecksums

_SPARE: Final = 8
"""Share of a part by which the last one may be longer."""

Observer = Callable[[str, int], None]
"""Called with an object's name and how many more of its bytes are stored."""


@dataclass(frozen=True, slots=True)
class StagedObject:
    """An object whose bytes are all stored and whose upload is open: invisible until it is completed."""

    upload: Upload
    parts: tuple[Part, ...]
    checksum: str | None = None
    """``<algorithm>:<base64>`` of all bytes sent."""

    @property
    def size(self) -> int:
        """Bytes sent."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True, slots=True)
class Sent:
    """A staged object, and the checksums of what it holds, which stay on the rank."""

    staged: StagedObject
    fragments: list[Fragment]
    """In the order of the object's bytes."""


@dataclass(slots=True)
class _Sending:
    upload: Future[Upload]
    parts: list[Future[_SentPart]]


@dataclass(frozen=True, slots=True)
class _SentPart:
    part: Part
    fragments: list[Fragment]
    whole: Fragment
    """All of them as one."""


class Uploader:
    """Sends the objects of one rank for one save.

    Args:
        store: where to.
        concurrency: requests in flight at most.
        memory_limit: bytes held beyond the caller's tensors.
        observer: called for every part that is stored, on the thread that sent it.
        padded: fill an object up where a store takes its bytes in multiples; without it, the process that
            completes an upload has to have all of its parts at hand.
        failed: set at the first failure, for segments that wait for others.
    """

    def __init__(
        self,
        store: ObjectStore,
        concurrency: int,
        memory_limit: int,
        observer: Observer | None = None,
        *,
        padded: bool = True,
        failed: threading.Event | None = None,
    ) -> None:
        self._store = store
        self.algorithm = algorithm_for(store.part_checksum)
        """Of the checksums that are taken."""
        self._limits = store.part_limits
        self._in_advance = store.part_checksum is not None
        self._concurrency = concurrency
        self._lanes = transfer_lanes(store, "up", concurrency)
        self._observer = observer
        self._memory_limit = memory_limit
        self._budget = MemoryBudget(memory_limit)
        self._scratch = BufferPool(memory_limit)
        self._room = threading.BoundedSemaphore(2 * concurrency)
        self._multiple = self._limits.multiple if padded else 1
        self._failed = failed or threading.Event()
        self.started: list[Upload] = []
        """Uploads that the store confirmed, ended or not."""
        self.unconfirmed: set[str] = set()
        """Objects whose upload may have been started without an answer."""

    def send(
        self,
        objects: Mapping[str, tuple[Iterable[Segment], int]],
        cleared: Callable[[], None] | None = None,
    ) -> list[Sent]:
        """Upload every object; ``objects`` maps a name to its segments and its part size in bytes.

        Args:
            objects: the segments and the part size in bytes, by name.
            cleared: called once the uploads are being started; no byte of a part is sent before it returns.

        Raises:
            Exception: of ``cleared``, or the first failure of a request or of a segment iterator, once no
                request is in flight any more. Uploads are left open for the caller to abort.
        """
        sending: list[_Sending] = []
        with Workers(self._concurrency, thread_name_prefix="cloudckpt-upload") as pool:
            try:
                sending += [_Sending(pool.submit(self._begin, name), []) for name in objects]
                if cleared is not None:
                    cleared()
                self._send_parts(pool, sending, list(objects.values()))
            except BaseException:
                self._failed.set()
                raise
        self._scratch.clear()
        _raise_first(sending)
        return [self._sent(one) for one in sending]

    def _sent(self, one: _Sending) -> Sent:
        sent = [part.result() for part in one.parts]
        checksum = self.algorithm.text(self.algorithm.combine(part.whole for part in sent))
        staged = StagedObject(one.upload.result(), tuple(part.part for part in sent), checksum)
        return Sent(staged, [fragment for part in sent for fragment in part.fragments])

    def _send_parts(
        self,
        pool: Workers,
        sending: Sequence[_Sending],
        objects: Sequence[tuple[Iterable[Segment], int]],
    ) -> None:
        """Hand out the parts of all objects alternately: those of one may have to go one after another."""
        cut = [
            windows(_padded(segments, self._multiple), part_size, self._spare(part_size))
            for segments, part_size in objects
        ]
        under_way = list(zip(sending, cut, strict=True))
        while under_way:
            under_way = [(one, rest) for one, rest in under_way if self._send_next(pool, one, rest)]
            if self._failed.is_set():
                return
        for one in sending:
            if not one.parts:
                self._room.acquire()
                one.parts.append(pool.submit(self._send_part, one.upload, 1, Window(0, ()), 0, None))

    def _spare(self, part_size: int) -> int:
        """Return by how much the last part may be longer, where a short one more is one more round trip.

        Where parts go concurrently, it costs no time.
        """
        if not self._limits.in_order:
            return 0
        multiple = self._limits.multiple
        room = min(self._memory_limit, self._limits.max_size) - part_size
        return max(0, min(max(part_size // _SPARE, multiple), room)) // multiple * multiple

    def _send_next(self, pool: Workers, one: _Sending, rest: Iterator[Window]) -> bool:
        """Hand out an object's next part; False where there is none, or no use in it."""
        window = None if self._failed.is_set() else next(rest, None)
        if window is None:
            return False
        self._room.acquire()
        cost = window.cost  # once: it looks at thousands of pieces where tensors are small
        self._budget.admit(cost)
        if self._failed.is_set():
            self._budget.release(cost)
            self._room.release()
            return False
        after = one.parts[-1] if one.parts and self._limits.in_order else None
        one.parts.append(pool.submit(self._send_part, one.upload, len(one.parts) + 1, window, cost, after))
        return True

    def _begin(self, name: str) -> Upload:
        self.unconfirmed.add(name)
        try:
            upload = self._store.begin_upload(name)
        except BaseException:
            self._failed.set()
            raise
        self.started.append(upload)
        self.unconfirmed.discard(name)
        return upload

    def _send_part(
        self,
        upload: Future[Upload],
        number: int,
        window: Window,
        cost: int,
        after: Future[_SentPart] | None,
    ) -> _SentPart:
        try:
            if after is not None:
                wait([after])
            if self._failed.is_set():
                raise NotSentError
            to = upload.result()
            with self._lanes.taken(window.nbytes):
                part, fragments = self._transfer(to, number, window, cost)
        except BaseException:
            self._failed.set()
            raise
        else:
            if self._observer is not None:
                self._observer(to.name, part.size)
            return _SentPart(part, fragments, Fragment(window.nbytes, self.algorithm.combine(fragments)))
        finally:
            self._budget.release(cost)
            self._room.release()

    def _transfer(self, to: Upload, number: int, window: Window, cost: int) -> tuple[Part, list[Fragment]]:
        gathered = window.gathered
        with self._scratch.lent(gathered, locked=window.from_device, beside=cost - gathered) as scratch:
            buffers = window.buffers(scratch)
            tally = UploadChecksums(self.algorithm, window, buffers)
            checksum = None
            if self._in_advance:
                checksum = self.algorithm.text(self.algorithm.combine(tally.finish()))
            part = self._store.upload_part(
                to, number, window.offset, buffers, checksum=checksum, departed=tally.departed
            )
            return part, tally.finish()


def _padded(segments: Iterable[Segment], multiple: int) -> Iterator[Segment]:
    """Yield the segments, and zeros after them up to a multiple of so many bytes.

    A store that takes its bytes in multiples could keep the rest of an object only with the process that ends
    it.
    """
    size = 0
    for segment in segments:
        size += segment.nbytes
        yield segment
    if missing := -size % multiple:
        yield View(memoryview(bytes(missing)), borrowed=False)


class NotSentError(Exception):
    """A part that was not sent, or waited for in vain, because another request had failed."""


def _raise_first(sending: Sequence[_Sending]) -> None:
    """Raise what went wrong first; parts that were not sent for it only follow from it."""
    outcomes = [one.upload.exception() for one in sending]
    outcomes += [part.exception() for one in sending for part in one.parts]
    errors = [error for error in outcomes if error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, NotSentError)):
        raise error
