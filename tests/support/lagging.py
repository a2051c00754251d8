"""Listings that are minutes old, and a clock for the code that compares ages with them.

A listing of such a store shows each object as it was at a time of its own, up to ten minutes ago: objects put
since are missing, deleted ones are there, leases look older than they are, and pages come in another order.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any
from unittest import mock

from cloudckpt.backends.errors import ObjectNotFoundError
from cloudckpt.backends.save.save_lease import SILENT_FOR
from cloudckpt.backends.stores.base import (
    Arrived,
    Capabilities,
    Condition,
    Departed,
    Listing,
    ObjectInfo,
    ObjectStore,
    Part,
    PendingUpload,
    Upload,
)
from cloudckpt.backends.stores.memory import MemoryStore
from support.turnstile import METADATA, Kind

PAUSE = timedelta(minutes=15)
"""More than a listing lags, and more than a save may be silent."""
GHOST = -2
"""The step 2 that is listed although it was deleted."""
_CLOCKED = (
    "cloudckpt.backends.manage.gc",
    "cloudckpt.backends.save.save_lease",
    "cloudckpt.backends.stores.memory",
    "cloudckpt.retention",
    "cloudckpt.run",
    "fsspec.implementations.memory",
)
_newest = threading.local()
_NOT_OF_A_RUN = NotImplementedError("retention does this in the folder of a step")


class _Clock:
    """The time of a world. It stands still but for pauses."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def advance(self) -> None:
        self.now += PAUSE


clock = _Clock()


class _Datetime(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Any:
        return clock.now if tz is not None else clock.now.replace(tzinfo=None)


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """Let the code under test read the world's clock."""
    with contextlib.ExitStack() as stack:
        for module in _CLOCKED:
            stack.enter_context(mock.patch(f"{module}.datetime", _Datetime))
        yield


@dataclass
class Past:
    """What was there minutes ago, and all that was since."""

    then: dict[str, ObjectInfo] = field(default_factory=dict)
    since: dict[str, ObjectInfo] = field(default_factory=dict)

    @classmethod
    def of(cls, objects: Iterable[ObjectInfo], renewed: Iterable[str]) -> Past:
        """The past from now on; leases that were renewed are listed as they were before."""
        before = {*renewed}
        old = clock.now - SILENT_FOR
        then = {i.name: replace(i, modified=old) if i.name in before else i for i in objects}
        return cls(then, dict(then))

    def note(self, objects: Iterable[ObjectInfo]) -> None:
        self.since |= {info.name: info for info in objects if info.name not in self.then}

    def states(self) -> tuple[Sequence[ObjectInfo], Sequence[ObjectInfo]]:
        return [*self.then.values()], [*self.since.values()]

    def listing(self, kind: Kind, now: Listing, prefix: str) -> Listing:
        """Return what a listing may show."""
        current = {info.name: info for info in now.objects}
        fresh = {**self.since, **current}
        match kind:
            case Kind.OLD:
                shown = self.then
            case Kind.UNMARKED:
                shown = {n: i for n, i in fresh.items() if not _is_hidden(n)}
                shown |= {n: i for n, i in self.then.items() if _is_hidden(n)}
            case Kind.UNCOMMITTED:
                shown = {n: i for n, i in current.items() if n != METADATA}
                shown |= {n: i for n, i in self.then.items() if n == METADATA}
            case _:
                shown = {n: i for n, i in fresh.items() if _is_hidden(n)}
                shown |= {n: i for n, i in self.then.items() if not _is_hidden(n)}
        names = sorted((name for name in shown if name.startswith(prefix)), reverse=True)
        found = tuple(shown[name] for name in names)
        return now if {*found} == {*now.objects} else Listing(found)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


@contextlib.contextmanager
def neighbour(step: int) -> Iterator[None]:
    """Have step 2 in the run of this actor, committed or deleted a moment ago."""
    _newest.step = step
    try:
        yield
    finally:
        del _newest.step


class RunOfTwo(ObjectStore):
    """A run whose step 1 is the checkpoint of a world, and whose step 2 nobody touches."""

    def __init__(self, step: ObjectStore, uri: str) -> None:
        self._step, self._uri = step, uri
        self._folder = step.uri.removeprefix(f"{uri}/")
        self._ghost = getattr(_newest, "step", 2) == GHOST
        self._other = f"{self._folder[:-1]}2/.metadata"

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def lists_at_once(self) -> bool:
        return self._step.lists_at_once

    @property
    def capabilities(self) -> Capabilities:
        return self._step.capabilities

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        assert not delimiter and prefix == "step-"
        objects = [replace(one, name=f"{self._folder}/{one.name}") for one in self._step.list().objects]
        return Listing((ObjectInfo(self._other, 1, "1", clock.now), *objects))

    def stat(self, name: str) -> ObjectInfo:
        if name == self._other and not self._ghost:
            return ObjectInfo(name, 1, "1", clock.now)
        if name.startswith(f"{self._folder}/"):
            return self._step.stat(name.removeprefix(f"{self._folder}/"))
        raise ObjectNotFoundError("there is no such object", uri=self._uri, object_name=name)

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        raise _NOT_OF_A_RUN

    def get(self, name: str) -> tuple[bytes, ObjectInfo]:
        raise _NOT_OF_A_RUN

    def read_into(
        self, name: str, offset: int, buffers: Sequence[memoryview], *, arrived: Arrived | None = None
    ) -> int | None:
        raise _NOT_OF_A_RUN

    def delete(self, names: Iterable[str]) -> None:
        raise _NOT_OF_A_RUN

    def begin_upload(self, name: str) -> Upload:
        raise _NOT_OF_A_RUN

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
        raise _NOT_OF_A_RUN

    def complete_upload(self, upload: Upload, parts: Sequence[Part], *, confirm: bool = True) -> ObjectInfo:
        raise _NOT_OF_A_RUN

    def abort_upload(self, upload: Upload) -> None:
        raise _NOT_OF_A_RUN

    def pending_uploads(self, prefix: str = "") -> Iterator[PendingUpload]:
        raise _NOT_OF_A_RUN


@dataclass
class Lag:
    """What listings of every memory store lack and show."""

    hidden: list[Callable[[str], bool]] = field(default_factory=list)
    ghosts: dict[str, dict[str, ObjectInfo]] = field(default_factory=dict)
    """Infos of deleted objects, by the URI of a store and their name."""

    def hide(self, part: str) -> None:
        """List no object whose name has this in it."""
        self.hidden.append(lambda name: part in name)

    def keep(self, store: ObjectStore) -> None:
        """Go on to list what is in a store now."""
        self.ghosts[store.uri] = {info.name: info for info in store.list().objects}


@contextlib.contextmanager
def lagging_listings() -> Iterator[Lag]:
    """Have listings of memory stores lag as the test says, in every part of the library."""
    lag, listed = Lag(), MemoryStore.list

    def old(store: MemoryStore, prefix: str = "", *, delimiter: bool = False) -> Listing:
        now = listed(store, prefix, delimiter=delimiter)
        shown = {info.name: info for info in now.objects}
        shown |= {
            name: info
            for name, info in lag.ghosts.get(store.uri, {}).items()
            if name.startswith(prefix) and not (delimiter and "/" in name.removeprefix(prefix))
        }
        names = [name for name in shown if not any(is_hidden(name) for is_hidden in lag.hidden)]
        return replace(now, objects=tuple(shown[name] for name in sorted(names, reverse=True)))

    no = property(lambda _: False)
    with mock.patch.object(MemoryStore, "list", old), mock.patch.object(MemoryStore, "lists_at_once", no):
        yield lag
