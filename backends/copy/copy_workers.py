"""The bytes of a checkpoint on their way from one store to another, several parts at a time.

Every worker takes the next thing that there is to do: a part of an object that is under way, or the next
object. The worker that sends the last part of one makes it visible. So few objects are open at a time, and
the journal stays small.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, wait

from cloudckpt.backends.checksums import algorithm_for
from cloudckpt.backends.config.options import Options
from cloudckpt.backends.copy import object_copy
from cloudckpt.backends.copy.copy_checksums import Passing
from cloudckpt.backends.copy.journal import CopyJournal, Entry, SentPart
from cloudckpt.backends.copy.object_copy import Moving, Original, is_unique
from cloudckpt.backends.errors import (
    AccessDeniedError,
    IntegrityError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    UnansweredError,
)
from cloudckpt.backends.save import commit
from cloudckpt.backends.save.uploader import Observer, StagedObject
from cloudckpt.backends.stores.base import ObjectInfo, ObjectStore
from cloudckpt.backends.system.system_limits import Workers
from cloudckpt.backends.transfer.adaptive_concurrency import lanes
from cloudckpt.backends.transfer.buffer_pool import BufferPool


class Relay:
    """Copies objects.

    Args:
        source: where from.
        options: of the source.
        destination: where to, with nothing committed that names these objects.
        into: options of the destination.
        journal: records every part.
        ready: asked before anything becomes visible; raises where nothing may.
        observer: called with an object's name and how many more of its bytes are at the destination.
    """

    def __init__(
        self,
        source: ObjectStore,
        options: Options,
        destination: ObjectStore,
        into: Options,
        *,
        journal: CopyJournal,
        ready: Callable[[], None],
        observer: Observer | None = None,
    ) -> None:
        self._source = source
        self._destination = destination
        self._options = into
        self._in_order = destination.part_limits.in_order
        self._algorithm = algorithm_for(destination.part_checksum)
        self._in_advance = destination.part_checksum is not None
        self._journal = journal
        self._ready = ready
        self._observer = observer
        self._down = lanes(source.uri, "down", options.concurrency)
        self._up = lanes(destination.uri, "up", into.concurrency)
        self._scratch = BufferPool(into.memory_limit)
        self._by_store = True
        self._turn = threading.Condition()
        self._waiting: deque[Original] = deque()
        self._open: list[Moving] = []
        self._beginning = 0
        self._error: BaseException | None = None
        self._damaged: list[Moving] = []
        self.copied: dict[str, ObjectInfo] = {}
        """What is at the destination now."""
        self.sent = 0
        """Bytes that went through here."""
        self.by_store = 0
        """Bytes that the destination's store copied itself."""

    def copy(self, originals: Iterable[Original]) -> None:
        """Bring every object to the destination.

        Raises:
            Exception: the first failure, once no request is in flight any more. The journal says what is
                there.
        """
        self._waiting.extend(originals)
        count = self._options.concurrency
        try:
            with Workers(count, thread_name_prefix="cloudckpt-copy") as pool:
                workers = [pool.submit(self._work) for _ in range(count)]
                try:
                    wait(workers, return_when=FIRST_EXCEPTION)
                except BaseException as error:  # Ctrl-C: what is in flight ends, and nothing more begins
                    self._fail(error)
                    raise
        finally:
            self._scratch.clear()
            for one in self._damaged:
                self._journal.forget(one.name)
                self._destination.abort_upload(one.upload)
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except BaseException as error:
                self._fail(error)
                raise

    def _fail(self, error: BaseException) -> None:
        with self._turn:
            self._error = self._error or error
            self._turn.notify_all()

    def _next(self) -> Callable[[], None] | None:
        """Return the next task, waiting for one; None at the end."""
        with self._turn:
            while self._error is None:
                for one in self._open:
                    if one.todo and not (one.in_flight and self._in_order):
                        one.in_flight += 1
                        return functools.partial(self._send_part, one, one.todo.popleft())
                if self._waiting and len(self._open) + self._beginning < self._options.concurrency:
                    self._beginning += 1
                    return functools.partial(self._begin, self._waiting.popleft())
                if not (self._waiting or self._open or self._beginning):
                    return None
                self._turn.wait()
        return None

    def _begin(self, original: Original) -> None:
        opened = None if self._is_copied_by_store(original) else self._opened(original)
        with self._turn:
            self._beginning -= 1
            if opened is not None:
                self._open.append(opened)
            self._turn.notify_all()
        if opened is not None and not opened.todo:  # all of its parts were there
            self._end(opened)

    def _is_copied_by_store(self, original: Original) -> bool:
        entry = self._journal.found.get(original.info.name)
        if not self._by_store or (entry is not None and entry.upload_id is not None):
            return False
        self._may_show()
        copied = self._destination.copy_from(self._source, original.info)
        if copied is None:
            self._by_store = False
            return False
        self._check_copied(original.info, copied)
        self._note_end(original.info, copied)
        with self._turn:
            self.by_store += original.info.size
        self._tell(original.info.name, original.info.size)
        return True

    def _opened(self, original: Original) -> Moving:
        store, name = self._destination, original.info.name
        entry = self._journal.found.get(name)
        opened = object_copy.resumed(store, original, entry, self._options, self._algorithm)
        if original.in_the_way:
            self._may_show()
            store.delete([name])
        if opened is None:
            opened = object_copy.start_copy(store, original, self._options)
        self._journal.begin(name, opened.entry)
        self._tell(name, sum(one.part.size for one in opened.sent.values()))
        return opened

    def _send_part(self, one: Moving, number: int) -> None:
        self._journal.check()
        start, stop = one.window(number)
        with self._scratch.lent(stop - start) as buffer:
            passing = Passing(one.original.checks, start, buffer)
            with self._down.taken(buffer.nbytes):
                self._read(one, start, buffer, passing)
            checksum = self._algorithm.text(passing.checksum(self._algorithm))
            in_advance = checksum if self._in_advance else None
            with self._up.taken(buffer.nbytes):
                part = self._destination.upload_part(one.upload, number, start, [buffer], checksum=in_advance)
        sent = SentPart(part, checksum, passing.edges)
        self._journal.add(one.name, sent)
        with self._turn:
            self.sent += part.size
        self._tell(one.name, part.size)
        with self._turn:
            one.sent[number] = sent
            one.in_flight -= 1
            last = not (one.todo or one.in_flight)
            self._turn.notify_all()
        if last:
            self._end(one)

    def _read(self, one: Moving, start: int, buffer: memoryview, passing: Passing) -> None:
        try:
            if buffer.nbytes:
                self._source.read_into(one.name, start, [buffer], arrived=passing.arrived)
            passing.finish()
        except ObjectNotFoundError as error:
            raise _changed(self._source, one.name) from error
        except IntegrityError as error:
            self._note_damage(one, error)
            raise

    def _end(self, one: Moving) -> None:
        """Make an object visible that is there with all its parts, and is what its source still is."""
        info, store = one.original.info, self._destination
        try:
            one.compare_across()
            self._check_source(info)
        except IntegrityError as error:
            self._note_damage(one, error)
            raise
        self._may_show()
        staged = one.staged
        try:
            stored = self._completed(one, staged)
        except (IntegrityError, StorageError) as error:
            if one.was_noted and not isinstance(error, UnansweredError | AccessDeniedError):
                self._note_damage(one, error)  # or the next copy would have the same answer
            raise
        try:
            commit.check_stored(store, staged, stored)
        except BaseException:
            store.delete([one.name])  # or it would be taken for whole the next time
            raise
        self._note_end(info, stored)
        with self._turn:
            self._open.remove(one)
            self._turn.notify_all()

    def _completed(self, one: Moving, staged: StagedObject) -> ObjectInfo:
        store = self._destination
        try:
            return store.complete_upload(one.upload, staged.parts)
        except PreconditionFailedError:  # a copy that was not dead yet was faster
            if is_unique(one.name):
                store.abort_upload(one.upload)
                return store.stat(one.name)
            self._may_show()
            store.delete([one.name])  # which may be of another checkpoint
            return store.complete_upload(one.upload, staged.parts)

    def _may_show(self) -> None:
        """Make sure that this copy is still the one that may make objects visible here."""
        self._journal.check()
        self._ready()

    def _note_damage(self, one: Moving, error: Exception) -> None:
        """Abandon an object that must not be completed, once no part of it is in flight."""
        self._fail(error)
        with self._turn:
            self._damaged.append(one)

    def _note_end(self, info: ObjectInfo, stored: ObjectInfo) -> None:
        self._journal.finish(info.name, Entry(info.size, info.version, done=stored.version or ""))
        with self._turn:
            self.copied[info.name] = stored

    def _check_copied(self, info: ObjectInfo, copied: ObjectInfo) -> None:
        """Compare what the store says of both, for the bytes did not come by here."""
        same = info.checksum is None or copied.checksum is None or info.checksum == copied.checksum
        try:
            if copied.size != info.size or not same:
                raise IntegrityError(
                    "the store's own copy is not the object that was copied",
                    uri=self._destination.uri,
                    object_name=info.name,
                    hint="Nothing was committed: copy again",
                )
            self._check_source(info)
        except IntegrityError:
            self._destination.delete([info.name])
            raise

    def _check_source(self, info: ObjectInfo) -> None:
        try:
            now = self._source.stat(info.name)
        except ObjectNotFoundError as error:
            raise _changed(self._source, info.name) from error
        if (now.size, now.version) != (info.size, info.version):
            raise _changed(self._source, info.name)

    def _tell(self, name: str, size: int) -> None:
        if self._observer is not None and size:
            self._observer(name, size)


def _changed(store: ObjectStore, name: str) -> IntegrityError:
    return IntegrityError(
        "the object was changed or deleted while it was copied",
        uri=store.uri,
        object_name=name,
        hint="Nothing was committed: copy what is there now, or another step",
    )
