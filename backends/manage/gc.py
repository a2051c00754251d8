"""Garbage: what saves and copies that died left below a prefix, and nothing else.

A save that is killed can't clean up after itself. It leaves open uploads, its marker, and if it died inside
the commit, data objects that no ``.metadata`` names. All are invisible to every reader and cost money. Only
names that this library gives are ever touched.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.convert import convert_lease
from cloudckpt.backends.copy.journal import JOURNAL, left_by
from cloudckpt.backends.errors import (
    ConfigurationError,
    IntegrityError,
    ObjectNotFoundError,
    UnsafeCheckpointError,
    UnsupportedError,
)
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.load.read_lease import READ_LEASE
from cloudckpt.backends.manage import confirmation, set_aside
from cloudckpt.backends.save.save_lease import MARKER, SILENT_FOR, is_silent, silent_since
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import EmptyFolder, ObjectInfo, ObjectStore, PendingUpload, Upload
from cloudckpt.backends.stores.object_names import DATA, HIDDEN_PREFIX, PIN, PROBE, STEP
from cloudckpt.backends.system import background_log

_log = background_log.logger(__name__)

_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
_PIN = re.compile(rf"(?:.*/)?{re.escape(PIN)}")


@dataclass(frozen=True, slots=True)
class Garbage:
    """The objects that were removed, or with ``dry_run`` would be. Names are relative to the URI."""

    uploads: tuple[str, ...]
    """Objects whose upload was pending."""
    objects: tuple[str, ...]
    """Data objects that no checkpoint names."""
    size: int
    """Bytes of ``objects``."""
    traces: tuple[str, ...] = ()
    """Leases of dead saves and loads, journals of dead copies, metadata that was set aside, probes of a store
    that were cut off, and empty folders of steps, whose names end in ``/``."""
    skipped: tuple[str, ...] = ()
    """Work that the store does not support, each with its reason; uploads may be left then."""


def collect_garbage(
    uri: str | os.PathLike[str] | Target,
    *,
    older_than: timedelta | float = timedelta(days=1),
    silent_for: timedelta | float = SILENT_FOR,
    dry_run: bool = False,
    **options: Any,
) -> Garbage:
    """Remove what saves that died left below ``uri``, a checkpoint or a whole run.

    A folder is left alone while a save is in progress in it: its marker is renewed every minute. Times are
    the store's, compared with this machine's clock. A save that wakes up after it was taken for dead fails
    and commits nothing. A folder whose ``.metadata`` can't be read is left alone.

    Args:
        uri: the checkpoint or the run.
        older_than: the age, as a timedelta or in seconds, from which on something is garbage. Zero takes
            everything that no save in progress owns. A negative age reaches into the future, for a store
            whose clock is ahead.
        silent_for: the time after which a save counts as dead whose marker was not renewed. What is put
            without a marker, such as the marker itself or a probe of the store, is never younger than this
            when it is removed. With zero or less every save counts as dead: use it where none is running.
        dry_run: remove nothing, and return what would be removed.
        options: of the URI.

    Returns:
        The names of what was removed. A store that lists or aborts no uploads keeps those, and ``skipped``
        says so.

    Raises:
        ConfigurationError: an age is not a finite time.
        StorageError: the store could not list or delete.
    """
    age, silence = _age("older_than", older_than), _age("silent_for", silent_for)
    skipped: list[str] = []
    with open_store(Target.given("collect_garbage", uri, options)) as store:
        # Uploads first, then objects, then metadata. A save that begins between two of these steps has put
        # its marker before its first upload, and one that commits between them is seen as committed.
        started = _pending(store, skipped)
        pending = [one for one in started if _is_ours(one.upload.name)]
        listing = store.list().objects
        now = datetime.now(UTC)
        bound, silent = _before(now, age), _before(now, silence)
        if not store.lists_at_once:  # what is younger than the listing may have a marker that it lacks
            bound = min(bound, _before(now, SILENT_FOR))
        # What is put without a marker to guard it: no save owns it, and one may be putting it right now.
        unguarded = min(bound, silent)
        dead, busy = _markers(store, listing, silent)
        uploads = [
            p
            for p in pending
            if _is_old(p.started, unguarded if _is_unguarded(p.upload.name) else bound)
            and _parent(p.upload.name) not in busy
        ]
        leases, left = _conversions(store, listing, started, unguarded)
        journals, abandoned, copied = _copies(store, listing, bound, busy)
        asides = _set_aside(store, listing, bound, busy)
        copied |= set_aside.objects_of(store, asides)
        uploads += [PendingUpload(one) for one in abandoned if one not in {p.upload for p in uploads}]
        old = [
            info
            for info in listing
            if (DATA.fullmatch(info.name) or info.name in copied)
            and _is_old(info.modified, bound)
            and _parent(info.name) not in busy
        ]
        # A save that is only silent so far, and has nothing old, may wake up and go on.
        touched = {_parent(p.upload.name) for p in uploads} | {_parent(i.name) for i in (*old, *journals)}
        traces = [i for i in dead if _is_old(i.modified, bound) or _parent(i.name) in touched]
        traces += [i for i in listing if PROBE.fullmatch(i.name) and _is_old(i.modified, unguarded)]
        if not dry_run:
            store.delete(info.name for info in traces)  # first: a save that finds its marker gone gives up
        unnamed = _unnamed(store, old, [info for info in listing if info not in asides])
        if not dry_run:
            # A copy that begins now goes on with what an earlier one left: it looks after it has a marker.
            doomed = {_parent(p.upload.name) for p in uploads}
            doomed |= {_parent(info.name) for info in (*unnamed, *journals, *asides)}
            saving = {folder for folder in doomed if _is_in_use(store, folder, listing, silent)}
            uploads = [p for p in uploads if _parent(p.upload.name) not in saving]
            unnamed = [info for info in unnamed if _parent(info.name) not in saving]
            journals = [info for info in (*journals, *asides) if _parent(info.name) not in saving]
            uploads = _aborted(store, uploads, skipped)
            store.delete(info.name for info in unnamed)
            store.delete(info.name for info in journals)  # last, for it tells what else there is
            convert_lease.remove(store, left, leases)
        else:
            journals += asides
        folders = [one.name for one in store.empty_folders() if _is_left_empty(one, unguarded)]
        if not dry_run:
            for name in folders:
                store.remove_empty_folder(name)
        traces += journals
        unnamed += [info for info in listing if info.name in left.objects]
    return Garbage(
        tuple(sorted([*(p.upload.name for p in uploads), *(one.name for one in left.uploads)])),
        tuple(sorted(info.name for info in unnamed)),
        sum(info.size for info in unnamed),
        tuple(sorted([*(info.name for info in traces), *leases, *(f"{name}/" for name in folders)])),
        tuple(skipped),
    )


def _age(name: str, given: timedelta | float) -> timedelta:
    """Read an age that was given as a timedelta or as a number of seconds."""
    if isinstance(given, timedelta):
        return given
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise ConfigurationError(
            f"{name} is {given!r}",
            hint="Give a timedelta, or a finite number of seconds",
        )
    try:
        return timedelta(seconds=given)
    except OverflowError as error:
        raise ConfigurationError(f"{name} is {given!r}", hint="Give less than a million years") from error


def _before(now: datetime, age: timedelta) -> datetime:
    """Return the time so long before now, or the end of the calendar that is nearest to it."""
    try:
        return now - age
    except OverflowError:
        return _FIRST if age > timedelta(0) else _LAST


def _is_unguarded(name: str) -> bool:
    """Return True for what is put where no marker says yet, or any more, that a save is in progress."""
    return any(
        pattern.fullmatch(name) for pattern in (MARKER, READ_LEASE, PROBE, JOURNAL, _PIN, convert_lease.LEASE)
    )


def _is_left_empty(folder: EmptyFolder, bound: datetime) -> bool:
    return STEP.fullmatch(folder.name) is not None and _is_old(folder.modified, bound)


def _pending(store: ObjectStore, skipped: list[str]) -> list[PendingUpload]:
    """Return the pending uploads; none where the store lists none."""
    try:
        return list(store.pending_uploads())
    except UnsupportedError as error:
        skipped.append(f"pending uploads were not looked for: {error.message}")
        return []


def _aborted(store: ObjectStore, uploads: Iterable[PendingUpload], skipped: list[str]) -> list[PendingUpload]:
    """Abort uploads, and return those that were aborted."""
    aborted: list[PendingUpload] = []
    for one in uploads:
        try:
            store.abort_upload(one.upload)
        except UnsupportedError as error:
            skipped.append(f"the upload of {one.upload.name} was not aborted: {error.message}")
        else:
            aborted.append(one)
    return aborted


def _copies(
    store: ObjectStore, listing: Iterable[ObjectInfo], bound: datetime, busy: AbstractSet[str]
) -> tuple[list[ObjectInfo], list[Upload], set[str]]:
    """Return the journals of copies that died: with their uploads, and the data objects that they name."""
    journals = [
        info
        for info in listing
        if JOURNAL.fullmatch(info.name) and _is_old(info.modified, bound) and _parent(info.name) not in busy
    ]
    left = [left_by(store, info.name) for info in journals]
    return journals, [one for uploads, _ in left for one in uploads], {o for _, objs in left for o in objs}


def _conversions(
    store: ObjectStore, listing: Sequence[ObjectInfo], started: Sequence[PendingUpload], bound: datetime
) -> tuple[list[str], convert_lease.Left]:
    """Return the leases of conversions that died, and what these left that no living one writes."""
    found = [info for info in listing if convert_lease.LEASE.fullmatch(info.name)]
    visible = frozenset(info.name for info in listing)
    found = confirmation.leases_now(store, found, bound)
    dead = [info.name for info in found if _is_old(info.modified, bound)]
    left = [convert_lease.left_by(store, name, visible, started) for name in dead]
    living = [convert_lease.left_by(store, i.name, visible, started) for i in found if i.name not in dead]
    writing = {one.name for its in living for one in its.uploads} | {o for its in living for o in its.objects}
    uploads = {one for its in left for one in its.uploads if one.name not in writing}
    objects = {one for its in left for one in its.objects if one not in writing}
    ordered = sorted(uploads, key=lambda one: (one.name, one.upload_id))
    return dead, convert_lease.Left(tuple(ordered), tuple(sorted(objects)))


def _set_aside(
    store: ObjectStore, listing: Sequence[ObjectInfo], bound: datetime, busy: AbstractSet[str]
) -> list[ObjectInfo]:
    """Return metadata that was set aside before ``bound``, in folders that are neither pinned nor busy.

    The notice goes with the last of them.
    """
    asides = [info for info in listing if set_aside.ASIDE.fullmatch(info.name)]
    old = [info for info in asides if _is_old(info.modified, bound) and _parent(info.name) not in busy]
    pinned = {folder for folder in {_parent(info.name) for info in old} if store.holds(folder + PIN)}
    old = [info for info in old if _parent(info.name) not in pinned]
    kept = busy | {_parent(info.name) for info in asides if info not in old}
    notices = [info for info in listing if _is_notice(info.name) and _is_old(info.modified, bound)]
    return old + [info for info in notices if _parent(info.name) not in kept]


def _is_notice(name: str) -> bool:
    return name.rpartition("/")[2] == set_aside.NOTICE


def _is_ours(name: str) -> bool:
    return _is_metadata(name) or DATA.fullmatch(name) is not None or _is_unguarded(name)


def _is_metadata(name: str) -> bool:
    return md.is_metadata(name.rpartition("/")[2]) or set_aside.ASIDE.fullmatch(name) is not None


def _markers(
    store: ObjectStore, listing: Iterable[ObjectInfo], bound: datetime
) -> tuple[list[ObjectInfo], set[str]]:
    """Return leases that were not renewed since ``bound``, and the folders where a save or load goes on."""
    markers = [info for info in listing if MARKER.fullmatch(info.name) or READ_LEASE.fullmatch(info.name)]
    markers = confirmation.leases_now(store, markers, bound)
    dead = [info for info in markers if is_silent(info, bound)]
    return dead, {_parent(info.name) for info in markers if info not in dead}


def _is_in_use(store: ObjectStore, folder: str, listing: Iterable[ObjectInfo], bound: datetime) -> bool:
    """Return True if a folder is in use or was kept, regardless of the listing."""
    shown = {info.name: info for info in listing if _parent(info.name) == folder}
    if confirmation.is_held(store, folder, shown, silent_since()):
        return True
    return bool(_markers(store, store.list(folder + HIDDEN_PREFIX).objects, bound)[1])


def _is_old(when: datetime | None, bound: datetime) -> bool:
    return when is not None and when <= bound


def _unnamed(store: ObjectStore, old: list[ObjectInfo], listing: Iterable[ObjectInfo]) -> list[ObjectInfo]:
    """Of ``old``, those that no metadata in their folder names; none where that can't be read."""
    candidates: defaultdict[str, list[ObjectInfo]] = defaultdict(list)
    for info in old:
        candidates[_parent(info.name)].append(info)
    metadata: defaultdict[str, list[str]] = defaultdict(list)
    for info in listing:
        if _is_metadata(info.name):
            metadata[_parent(info.name)].append(info.name)
    unnamed: list[ObjectInfo] = []
    for folder, infos in candidates.items():
        # The listing may be older than a commit, so what may name these is always asked for.
        names = {folder + md.METADATA_NAME, *metadata[folder]}
        names |= {f"{folder}__{rank}{md.METADATA_NAME}" for rank in _ranks(infos)}
        try:
            named = frozenset[str]().union(*(_named(store, folder, name) for name in names))
        except (IntegrityError, UnsafeCheckpointError) as error:
            _log.warning("left alone, because its metadata cannot be read: %s", error)
            continue
        unnamed += [info for info in infos if info.name not in named]
    return unnamed


def _ranks(infos: Iterable[ObjectInfo]) -> set[str]:
    """Return the ranks that wrote data objects, which may have metadata of their own."""
    return {info.name.rpartition("/")[2].split("_")[2] for info in infos if DATA.fullmatch(info.name)}


def _parent(name: str) -> str:
    """Return the folder of an object, as a prefix of names."""
    folder, slash, _ = name.rpartition("/")
    return folder + slash


def _named(store: ObjectStore, folder: str, name: str) -> frozenset[str]:
    try:
        data, _ = store.get(name)
    except ObjectNotFoundError:
        return frozenset()
    return frozenset(folder + named for named in md.objects_of(md.load(data, uri=store.uri, name=name)))
