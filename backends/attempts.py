"""Attempts at saving a step of a run that died: what they left is removed by a later save of the run.

A job that is killed and restarted again and again leaves a marker and open uploads each time, often of the
same step. A save that has committed removes what is left in its own step's folder, and in steps that were
begun and not committed, as far as the coordinator of each attempt there is dead: its process has ended on
this host, or its marker was not renewed for so long that `gc` takes it for dead. A folder with an attempt
that may be alive is not touched, nor is anything without a marker: both are left to `gc`.

An attempt whose coordinator is dead never commits, but for a request that is still on its way. Uploads that
are open then can't be part of it. Visible objects can: they are removed only in the folder of a committed
step, where the condition of such a request fails.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final

from cloudckpt.backends import background_log, process_identity
from cloudckpt.backends import metadata as md
from cloudckpt.backends.copying.journal import JOURNAL
from cloudckpt.backends.errors import CheckpointError, ObjectNotFoundError, UnsupportedError
from cloudckpt.backends.marker import MARKER, SILENT_FOR, is_silent
from cloudckpt.backends.printable import one_line
from cloudckpt.backends.store import ObjectInfo, ObjectStore, PendingUpload
from cloudckpt.backends.stores.names import STEP, STEP_PREFIX

_log = background_log.logger(__name__)

_DATA: Final = re.compile(r".*/__\d+_\d+\.[0-9a-f]{32}\.distcp")
_NEIGHBOURS: Final = 8
"""Steps before the committed one that are looked at: a marker without an upload is not found otherwise."""


def remove_dead(store: ObjectStore, committed: str) -> list[str]:
    """Remove what dead attempts left in a run, and return the names of the uploads and objects.

    It takes three requests, one for each folder that is looked at, and one for each marker there.

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
    times = [info.modified for info in store.list(f"{committed}/").objects if info.modified is not None]
    removed: list[str] = []
    for folder in sorted(near):
        if STEP.fullmatch(folder):
            removed += _removed(store, folder, uploads[folder], max(times, default=None), folder == committed)
    return removed


def _uploads(store: ObjectStore) -> defaultdict[str, list[PendingUpload]]:
    """Return the open uploads of data objects by their folder; none where the store lists none."""
    found: defaultdict[str, list[PendingUpload]] = defaultdict(list)
    try:
        for pending in store.pending_uploads(STEP_PREFIX):
            if _DATA.fullmatch(pending.upload.name):
                found[pending.upload.name.rpartition("/")[0]].append(pending)
    except UnsupportedError:
        found.clear()
    return found


def _removed(
    store: ObjectStore,
    folder: str,
    uploads: Sequence[PendingUpload],
    now: datetime | None,
    committed: bool,
) -> list[str]:
    """Remove what is left in one folder, if every attempt there is dead; ``now`` is the store's time."""
    listing = store.list(f"{folder}/").objects
    markers = [info for info in listing if MARKER.fullmatch(info.name)]
    if not markers or any(JOURNAL.fullmatch(info.name) for info in listing):
        return []
    metadata = f"{folder}/{md.METADATA_NAME}"
    if not committed and any(info.name == metadata for info in listing):
        return []  # committed by an attempt that ended since
    if not all(_is_dead(store, marker, now) for marker in markers):
        return []
    data = [info.name for info in listing if _DATA.fullmatch(info.name)]
    if committed:
        # Without conditions, a commit that is on its way would replace this one, and need its objects.
        data = _unnamed(store, metadata, data) if store.capabilities.conditional_create else []
    removed = [pending.upload.name for pending in uploads]
    if committed or not data:
        removed += [*data, *(info.name for info in markers)]
        store.delete(info.name for info in markers)  # first: an attempt that finds its marker gone gives up
        store.delete(data)
    for pending in uploads:
        try:
            store.abort_upload(pending.upload)
        except CheckpointError as error:
            _log.debug("the upload of %s was not aborted: %s", pending.upload.name, one_line(error))
    return removed


def _unnamed(store: ObjectStore, metadata: str, data: Iterable[str]) -> list[str]:
    """Return the data objects that the committed checkpoint does not consist of."""
    folder = metadata.rpartition("/")[0]
    named = md.objects_of(md.load(store.get(metadata)[0], uri=store.uri, name=metadata))
    return [name for name in data if name.removeprefix(f"{folder}/") not in named]


def _is_dead(store: ObjectStore, marker: ObjectInfo, now: datetime | None) -> bool:
    if now is not None and is_silent(marker, now - SILENT_FOR):
        return True
    try:
        told = json.loads(store.get(marker.name)[0])
    except ObjectNotFoundError:  # its save has ended since
        return False
    except ValueError:
        return False
    return isinstance(told, dict) and process_identity.is_dead(told)
