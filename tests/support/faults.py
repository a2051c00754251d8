"""Faults at any call of a store or a planner, on one rank, for tests of what a failed save leaves behind."""

from __future__ import annotations

import contextlib
import enum
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from unittest import mock

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import StorageError, UnansweredError
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import (
    Arrived,
    Capabilities,
    Condition,
    Departed,
    Listing,
    ObjectInfo,
    ObjectStore,
    Overwrite,
    Part,
    PartLimits,
    PendingUpload,
    Upload,
)

T = TypeVar("T")

SEAM = "cloudckpt.backends.dcp_base.open_store"


class InjectedFault(StorageError):
    """The fault that a test asked for, answered by the store."""


class InjectedSilence(UnansweredError):
    """The fault that a test asked for: the request's answer never came."""


class PlannerFault(RuntimeError):
    """The fault that a test asked for, in a planner."""


class Kind(enum.Enum):
    """What goes wrong at a call."""

    REFUSED = "not carried out, and the store says so"
    FAILED_AFTER = "carried out, and reported as failed"
    SILENT_BEFORE = "not carried out, and no answer comes"
    SILENT_AFTER = "carried out, and no answer comes"
    WRONG_SIZE = "carried out, and the object is one byte short by the store's account"
    RIVAL = "another job puts something of its own first"


_BEFORE = {Kind.REFUSED: InjectedFault, Kind.SILENT_BEFORE: InjectedSilence}
_AFTER = {Kind.FAILED_AFTER: InjectedFault, Kind.SILENT_AFTER: InjectedSilence}


@dataclass(frozen=True, slots=True)
class Fault:
    """One call on one rank that goes wrong; the operation is the name of an ``ObjectStore`` method."""

    operation: str
    rank: int
    call: int = 1
    """Counted from 1, in the order in which the rank makes the calls."""
    kind: Kind = Kind.REFUSED


@dataclass(slots=True)
class Journal:
    """How often each operation was called on this rank, and whether the fault came to pass."""

    calls: Counter[str] = field(default_factory=Counter)
    injected: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, operation: str) -> int:
        """Count a call and return its number."""
        with self.lock:
            self.calls[operation] += 1
            return self.calls[operation]


class FaultyStore(ObjectStore):
    """A store that counts its calls, and fails as told."""

    def __init__(self, store: ObjectStore, fault: Fault | None, journal: Journal) -> None:
        self._store = store
        self._fault = fault
        self._journal = journal

    @property
    def uri(self) -> str:
        return self._store.uri

    @property
    def is_remote(self) -> bool:
        return self._store.is_remote

    @property
    def part_limits(self) -> PartLimits:
        return self._store.part_limits

    @property
    def lists_at_once(self) -> bool:
        return self._store.lists_at_once

    @property
    def capabilities(self) -> Capabilities:
        return self._store.capabilities

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        def rival() -> None:
            self._store.put(name, b"not ours", Overwrite())

        return self._through("put", lambda: self._store.put(name, data, condition), name, rival)

    def get(self, name: str) -> tuple[bytes, ObjectInfo]:
        return self._through("get", lambda: self._store.get(name), name)

    def read_into(
        self,
        name: str,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        arrived: Arrived | None = None,
    ) -> int | None:
        def read() -> int | None:
            return self._store.read_into(name, offset, buffers, arrived=arrived)

        return self._through("read_into", read, name)

    def stat(self, name: str) -> ObjectInfo:
        return self._through("stat", lambda: self._store.stat(name), name)

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        return self._through("list", lambda: self._store.list(prefix, delimiter=delimiter))

    def delete(self, names: Iterable[str]) -> None:
        self._through("delete", lambda: self._store.delete(names))

    def begin_upload(self, name: str) -> Upload:
        return self._through("begin_upload", lambda: self._store.begin_upload(name), name)

    def upload_part(
        self,
        upload: Upload,
        number: int,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        checksum: str | None = None,
        departed: Departed | None = None,
    ) -> Part:
        def send() -> Part:
            return self._store.upload_part(
                upload, number, offset, buffers, checksum=checksum, departed=departed
            )

        return self._through("upload_part", send, upload.name)

    def complete_upload(self, upload: Upload, parts: Sequence[Part], *, confirm: bool = True) -> ObjectInfo:
        def complete() -> ObjectInfo:
            return self._store.complete_upload(upload, parts, confirm=confirm)

        return self._through("complete_upload", complete, upload.name)

    def abort_upload(self, upload: Upload) -> None:
        self._through("abort_upload", lambda: self._store.abort_upload(upload), upload.name)

    def pending_uploads(self, prefix: str = "") -> Iterator[PendingUpload]:
        return self._through("pending_uploads", lambda: self._store.pending_uploads(prefix))

    def close(self) -> None:
        self._store.close()

    def _through(
        self,
        operation: str,
        act: Callable[[], T],
        name: str | None = None,
        rival: Callable[[], None] | None = None,
    ) -> T:
        number = self._journal.count(operation)
        fault = self._fault
        if fault is None or (fault.operation, fault.call) != (operation, number):
            return act()
        self._journal.injected = True
        place: dict[str, Any] = {"uri": self.uri, "object_name": name}
        message = f"injected into {operation} call {number}: {fault.kind.value}"
        if fault.kind in _BEFORE:
            raise _BEFORE[fault.kind](message, **place)
        if fault.kind is Kind.RIVAL and rival is not None:
            rival()
        result = act()
        if fault.kind in _AFTER:
            raise _AFTER[fault.kind](message, **place)
        if fault.kind is Kind.WRONG_SIZE and isinstance(result, ObjectInfo):
            return replace(result, size=result.size - 1)
        return result


@contextlib.contextmanager
def injected(fault: Fault | None, rank: int) -> Iterator[Journal]:
    """Let every store that the writer opens on this rank fail as ``fault`` says, if it is this rank's.

    With ``fault=None`` nothing fails, and the journal tells how many calls there are to fail.
    """
    journal = Journal()
    ours = fault if fault is not None and fault.rank == rank else None

    def open_faulty(target: Target) -> ObjectStore:
        return FaultyStore(open_store(target), ours, journal)

    with mock.patch(SEAM, open_faulty):
        yield journal


class FaultyPlanner(DefaultSavePlanner):
    """A save planner, one of whose methods raises ``PlannerFault``."""

    def __init__(self, failing: str) -> None:
        super().__init__()
        self._failing = failing

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name == self._failing:
            return _raise_planner_fault
        return super().__getattribute__(name)


def _raise_planner_fault(*_: Any, **__: Any) -> Any:
    raise PlannerFault("injected into the planner")
