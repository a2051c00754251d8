"""Attempts at saving a step of a run that died: what they left is removed by a later save of the run.

A job that is killed and restarted again and again leaves a marker and open uploads each time, often of the
same step. A save that has committed removes what is left in its own step's folder, and in steps that were
started and not committed, as far as the coordinator of each attempt there is dead: its process has ended on
this host, or its marker was not renewed for so long that `gc` takes it for dead. A folder with an attempt
that may be alive is not touched, nor is anything without a marker: both are left to `gc`.

An attempt whose coordinator is dead never commits, but for a request that is still on its way. Uploads that
are open then can't be part of it. Visible objects can: they are removed only in the folder of a committed
step, where the condition of such a request fails.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from cloudckpt.backends.copy.journal import JOURNAL
from cloudckpt.backends.errors import CheckpointError, ObjectNotFoundError, UnsupportedError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.load.read_lease import READ_LEASE
from cloudckpt.backends.manage.confirmation import is_held, leases_now
from cloudckpt.backends.manage.set_aside import ASIDE
from cloudckpt.backends.save.save_lease import MARKER, SILENT_FOR, is_silent
from cloudckpt.backends.stores.base import ObjectInfo, ObjectStore, PendingUpload
from cloudckpt.backends.stores.object_names import DATA, STEP, STEP_PREFIX
from cloudckpt.backends.system import background_log, process_identity
from cloudckpt.backends.system.printable import one_line

_log = background_log.logger(__name__)

_NEIGHBOURS: Final = 8
"""Steps before the committed one that are looked at: a marker without an upload is not found otherwise."""


def remove_dead(store: ObjectStore, committed: str) -> list[str]:
    """Remove what dead attempts left in a run, and return the names of the uploads and objects.

    It takes two requests, one for each folder that is looked at, and one for each marker there.

    Args:
        store: of the run.
        committed: the folder of the step that this process has just committed.

    Raises:
        StorageError: the store could not list or delete.
    """
    # Uploads first: the marker of an attempt that began one of them is in the listing, or it has ended.
    uploads = _uploads(store)
    folders = sorted(name.rstrip("/") for name in store.list(STEP_PREFIX, delimiter=True).prefixes)
    folders = [name for name in folders if STEP.fullmatch(name)]
    at = folders.index(committed) if committed in folders else len(folders)
    near = {committed, *folders[max(0, at - _NEIGHBOURS) :], *uploads}
    listings = {committed: store.list(f"{committed}/").objects}
    times = [info.modified for info in listings[committed] if info.modified is not None]
    now = max(times, default=None)
    removed: list[str] = []
    for folder in filter(STEP.fullmatch, sorted(near)):
        listing = listings.get(folder) or store.list(f"{folder}/").objects
        removed += _removed(store, folder, listing, uploads[folder], now, committed=folder == committed)
    return removed


def _uploads(store: ObjectStore) -> defaultdict[str, list[PendingUpload]]:
    """Return the open uploads of data objects by their folder; none where the store lists none."""
    found: defaultdict[str, list[PendingUpload]] = defaultdict(list)
    try:
        for pending in store.pending_uploads(STEP_PREFIX):
            if DATA.fullmatch(pending.upload.name):
                found[pending.upload.name.rpartition("/")[0]].append(pending)
    except UnsupportedError:
        found.clear()
    return found


def _removed(
    store: ObjectStore,
    folder: str,
    listing: Sequence[ObjectInfo],
    uploads: Sequence[PendingUpload],
    now: datetime | None,
    *,
    committed: bool,
) -> list[str]:
    """Remove read leases of dead loads from a folder, and what saves left if all of them are dead.

    ``now`` is the store's time.
    """
    since = None if now is None else now - SILENT_FOR
    leases = _confirmed(store, [info for info in listing if READ_LEASE.fullmatch(info.name)], since)
    removed = [info.name for info in leases if _is_dead(store, info, now)]
    store.delete(removed)
    markers = _confirmed(store, [info for info in listing if MARKER.fullmatch(info.name)], since)
    if not markers or not all(_is_dead(store, marker, now) for marker in markers):
        return removed
    names = [info.name for info in listing]
    metadata = f"{folder}/{md.METADATA_NAME}"
    if any(JOURNAL.fullmatch(name) for name in names) or (metadata in names and not committed):
        return removed  # a copy's, or committed by an attempt that has ended since
    data = _removable(store, folder, listing, since, committed=committed)
    if data is not None:
        names = [*data, *(info.name for info in markers)]
        store.delete(info.name for info in markers)  # first: an attempt that finds its marker gone gives up
        store.delete(data)
        removed += names
    for pending in uploads:
        try:
            store.abort_upload(pending.upload)
            removed.append(pending.upload.name)
        except CheckpointError as error:
            _log.debug("the upload of %s was not aborted: %s", pending.upload.name, one_line(error))
    return removed


def _removable(
    store: ObjectStore, folder: str, listing: Sequence[ObjectInfo], since: datetime | None, *, committed: bool
) -> list[str] | None:
    """Return the data objects of dead attempts that may be removed; None where some have to stay.

    A commit that is on its way needs its objects. It fails where a checkpoint is committed, by its condition.
    Objects younger than the checkpoint may be of a save that replaces it, whose marker is not listed yet.
    ``since`` is the time from which on the listing may lack something.
    """
    at = f"{folder}/{md.METADATA_NAME}"
    names = [info.name for info in listing if ASIDE.fullmatch(info.name)]
    named, younger = set[str](), None
    for name in [*names, at] if committed else names:
        found, info = store.get(name)
        named |= md.objects_of(md.load(found, uri=store.uri, name=name))
        younger = info.modified
    data = [
        info
        for info in listing
        if DATA.fullmatch(info.name) and info.name.removeprefix(f"{folder}/") not in named
    ]
    if not data:
        return []
    if not committed or since is None or not store.capabilities.conditional_create:
        return None
    if is_held(store, f"{folder}/", {info.name: info for info in listing}, since):
        return None
    return [info.name for info in data if not _is_younger(info, younger)]


def _is_younger(info: ObjectInfo, than: datetime | None) -> bool:
    if info.modified is None or than is None:
        return True
    # Times of an answer may be cut to seconds where those of a listing are not.
    return info.modified > (than + timedelta(seconds=1) if than.microsecond == 0 else than)


def _confirmed(store: ObjectStore, leases: list[ObjectInfo], since: datetime | None) -> list[ObjectInfo]:
    """Return leases as they are now; without a time of the store, as they are listed."""
    return leases if since is None else leases_now(store, leases, since)


def _is_dead(store: ObjectStore, marker: ObjectInfo, now: datetime | None) -> bool:
    if now is not None and is_silent(marker, now - SILENT_FOR):
        return True
    try:
        content = json.loads(store.get(marker.name)[0])
    except ObjectNotFoundError:  # its save has ended since
        return False
    except ValueError:
        return False
    return isinstance(content, dict) and process_identity.is_dead(content)
