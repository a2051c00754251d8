"""A store whose every call waits for its turn, and a world of actors that share one such store.

Calls are scheduling points where others could tell the difference. A save's own uploads, and its marker
where nobody collects garbage, are touched by no one else before the put of ``.metadata`` names them or after
it has failed, so that such a call commutes with all calls of all others: it is taken at once, as part of the
actor's step. It may still fail, and its actor may die at it.

An actor that dies does so right after a call. Dying before a call is the same as dying after the one before
it: in between, nothing that another can see happens.
"""

from __future__ import annotations

import enum
import re
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

from cloudckpt.backends.errors import CheckpointError, PreconditionFailedError
from cloudckpt.backends.format import metadata as md
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
    PendingUpload,
    Upload,
)
from support.faults import InjectedFault, InjectedSilence
from support.interleave import AbandonedError, Strand

T = TypeVar("T")

METADATA = md.METADATA_NAME
_ID = re.compile(r"[0-9a-f]{32}")


class Kind(enum.Enum):
    """What becomes of a call."""

    DONE = "done"
    REFUSED = "refused, and not done"
    FAILED = "done, and reported as failed"
    SILENT = "not done, and no answer"
    UNHEARD = "done, and no answer"
    LATE = "no answer, and done later"
    RETRIED = "done, and a second try of the client finds its condition broken"
    DIED = "done, and its actor dies"
    SENT = "its actor dies, and done later"
    ARRIVED = "arrives late"
    OLD = "done, and the listing is minutes old"
    UNMARKED = "done, and hidden objects and metadata are listed as they were minutes ago"
    UNFILLED = "done, and data objects are listed as they were minutes ago"
    UNCOMMITTED = "done, and metadata alone is listed as it was minutes ago"
    LATER = "a quarter of an hour passes"
    OVER = "nothing more happens"


LAGGING = (Kind.OLD, Kind.UNMARKED, Kind.UNFILLED, Kind.UNCOMMITTED)
CARRIED_OUT = frozenset({*LAGGING, Kind.DONE, Kind.FAILED, Kind.UNHEARD, Kind.RETRIED, Kind.DIED})
DEADLY = frozenset({Kind.DIED, Kind.SENT})
ANSWERS: Mapping[Kind, type[CheckpointError]] = {
    Kind.REFUSED: InjectedFault,
    Kind.FAILED: InjectedFault,
    Kind.SILENT: InjectedSilence,
    Kind.UNHEARD: InjectedSilence,
    Kind.LATE: InjectedSilence,
    Kind.RETRIED: PreconditionFailedError,
}
_OF_A_COMMIT = (
    Kind.REFUSED,
    Kind.FAILED,
    Kind.SILENT,
    Kind.UNHEARD,
    Kind.LATE,
    Kind.RETRIED,
    Kind.DIED,
    Kind.SENT,
)
_LOOKS = frozenset({"get", "stat", "list", "pending_uploads", "read_into"})
_PRIVATE = frozenset({"begin_upload", "upload_part", "complete_upload", "abort_upload"})


class Step(NamedTuple):
    """A choice: what becomes of the call that an actor waits with. ``-1`` is no actor."""

    actor: int
    kind: Kind


@dataclass(slots=True)
class Call:
    """A call that waits for its turn."""

    operation: str
    names: tuple[str, ...]
    act: Callable[[], Any]
    seen: Callable[[Any], object]
    """What of the answer the caller can tell, free of ids and versions that differ from run to run."""
    condition: Condition | None = None
    data: bytes = b""
    prefix: str = ""
    """Of the names that are listed."""
    answer: Any = None
    error: CheckpointError | None = None

    @property
    def told(self) -> object:
        """What the caller learns."""
        return self.seen(self.answer) if self.error is None else type(self.error).__name__

    @property
    def is_commit(self) -> bool:
        return self.operation == "put" and self.names == (METADATA,)

    @property
    def cleans(self) -> bool:
        """Whether something may stay behind when it fails: a removal, or what a removal must know of."""
        is_marker = self.operation == "put" and not self.is_commit
        return is_marker or self.operation in ("delete", "abort_upload", "pending_uploads")


@dataclass(slots=True)
class Actor:
    """A job that shares the store with others."""

    name: str
    index: int
    strand: Strand = field(init=False)
    call: Call | None = None
    dead: bool = False
    faults: int = 0
    """How many of the faults of this run were its own."""
    unclean: bool = False
    """A call that takes something away failed."""
    history: int = 0
    """A number for all calls so far and what was seen of their answers."""
    has_looked: bool = False
    looked: str | None = None
    """Whose metadata was there when it first looked."""
    disturbed: bool = False
    """Something was replaced or deleted since."""
    taken: set[str] = field(default_factory=set)
    """Names that it deleted."""

    @property
    def waiting(self) -> Call | None:
        """The call that it waits with."""
        return None if self.dead else self.call

    @property
    def outcome(self) -> object:
        """What its function returned or raised."""
        return self.strand.error if self.strand.error is not None else self.strand.value


class Aliases:
    """Names for the ids that a run draws at random, by who showed them first and in which order."""

    def __init__(self) -> None:
        self._owners: dict[str, str] = {}
        self._aliases: dict[str, str] = {}
        self._drawn: Counter[str] = Counter()

    def shown(self, name: str, owner: str | None = None) -> str:
        """Replace the ids in a name; those not seen before are the owner's."""
        return _ID.sub(lambda found: self._alias(found[0], owner), name)

    def owner(self, name: str) -> str | None:
        """Whose it is."""
        found = _ID.search(name)
        return self._owners.get(found[0]) if found else None

    def _alias(self, identifier: str, owner: str | None) -> str:
        if identifier not in self._aliases and owner is not None:
            self._drawn[owner] += 1
            self._owners[identifier] = owner
            self._aliases[identifier] = f"{owner}-{self._drawn[owner]}"
        return self._aliases[identifier]


class Turnstile(ObjectStore):
    """One actor's way to the shared store."""

    def __init__(
        self,
        store: ObjectStore,
        actor: Actor,
        over: threading.Event,
        seen: Callable[[ObjectInfo], str],
        lists: Callable[[str], bool],
    ) -> None:
        self._store = store
        self._actor = actor
        self._over = over
        self._seen = seen
        self._lists = lists

    @property
    def uri(self) -> str:
        return self._store.uri

    @property
    def is_remote(self) -> bool:
        return self._store.is_remote

    @property
    def lists_at_once(self) -> bool:
        return self._store.lists_at_once

    @property
    def capabilities(self) -> Capabilities:
        return self._store.capabilities

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        call = Call("put", (name,), lambda: self._store.put(name, data, condition), self._seen)
        call.condition, call.data = condition, data
        return cast(ObjectInfo, self._turn(call))

    def get(self, name: str) -> tuple[bytes, ObjectInfo]:
        return self._through("get", (name,), lambda: self._store.get(name), lambda got: self._seen(got[1]))

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

        def seen(_: object) -> object:
            data = b"".join(buffers)
            return f"{len(data)} bytes, {zlib.crc32(data):08x}"

        return self._through("read_into", (name,), read, seen)

    def stat(self, name: str) -> ObjectInfo:
        return self._through("stat", (name,), lambda: self._store.stat(name), self._seen)

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        def seen(listing: Listing) -> object:
            return ", ".join(sorted(self._seen(info) for info in listing.objects if self._lists(info.name)))

        call = Call("list", (), lambda: self._store.list(prefix, delimiter=delimiter), seen, prefix=prefix)
        return cast(Listing, self._turn(call))

    def delete(self, names: Iterable[str]) -> None:
        gone = tuple(names)
        self._through("delete", gone, lambda: self._store.delete(gone), lambda _: None)

    def begin_upload(self, name: str) -> Upload:
        return self._through("begin_upload", (name,), lambda: self._store.begin_upload(name), lambda _: None)

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
        data = b"".join(buffers)
        call = Call(
            "upload_part",
            (upload.name,),
            lambda: self._store.upload_part(upload, number, offset, [memoryview(data)]),
            lambda _: None,
            data=data,
        )
        return cast(Part, self._turn(call))

    def complete_upload(self, upload: Upload, parts: Sequence[Part], *, confirm: bool = True) -> ObjectInfo:
        return self._through(
            "complete_upload",
            (upload.name,),
            lambda: self._store.complete_upload(upload, parts),
            lambda info: info.size,
        )

    def abort_upload(self, upload: Upload) -> None:
        self._through(
            "abort_upload", (upload.name,), lambda: self._store.abort_upload(upload), lambda _: None
        )

    def pending_uploads(self, prefix: str = "") -> Iterator[PendingUpload]:
        def seen(pending: Iterable[PendingUpload]) -> object:
            return ", ".join(sorted(self._seen(ObjectInfo(p.upload.name, 0)) for p in pending))

        return iter(
            self._through("pending_uploads", (), lambda: list(self._store.pending_uploads(prefix)), seen)
        )

    def _through(
        self, operation: str, names: tuple[str, ...], act: Callable[[], T], seen: Callable[[T], object]
    ) -> T:
        return cast(T, self._turn(Call(operation, names, act, seen)))

    def _turn(self, call: Call) -> Any:
        """Wait for the search to choose what becomes of the call, and act on it."""
        if self._over.is_set():
            raise AbandonedError
        self._actor.call = call
        self._actor.strand.pause()
        if self._over.is_set():
            raise AbandonedError
        if call.error is not None:
            raise call.error
        return call.answer


def faults_of(call: Call) -> tuple[Kind, ...]:
    """What may go wrong at a call, deaths included."""
    if call.operation in _LOOKS:
        return (Kind.REFUSED, Kind.DIED)
    if call.is_commit:
        kinds = _OF_A_COMMIT
        # Without a condition there is none that a second try could find broken.
        return tuple(k for k in kinds if k is not Kind.RETRIED or not isinstance(call.condition, Overwrite))
    return (Kind.REFUSED, Kind.UNHEARD, Kind.DIED)


def is_private(call: Call, *, collected: bool) -> bool:
    """Whether the call commutes with every call of every other actor; see above."""
    if collected:  # who lists and looks for garbage sees uploads, objects and markers
        return call.operation == "upload_part"
    if call.operation in _PRIVATE:
        return True
    return bool(call.names) and all(name.startswith(".cloudckpt-save.") for name in call.names)
