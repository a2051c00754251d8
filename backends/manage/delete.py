"""Deleting a checkpoint: ``.metadata`` first, which ends it for every reader, and then its objects."""

from __future__ import annotations

import os
import re
from datetime import datetime
from functools import partial
from typing import Any, Final

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.config.uri_hints import advice
from cloudckpt.backends.copy.journal import JOURNAL
from cloudckpt.backends.errors import CheckpointNotFoundError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.load.read_lease import READ_LEASE, is_read
from cloudckpt.backends.manage.confirmation import is_held
from cloudckpt.backends.manage.set_aside import ASIDE, NOTICE, objects_of
from cloudckpt.backends.save import commit
from cloudckpt.backends.save.object_checks import found
from cloudckpt.backends.save.save_lease import MARKER, is_silent, silent_since
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import ObjectInfo, ObjectStore
from cloudckpt.backends.stores.object_names import PIN
from cloudckpt.backends.system import background_log
from cloudckpt.backends.system.printable import one_line
from cloudckpt.backends.transfer.task_pool import start_task

_log = background_log.logger(__name__)

_TRACE: Final = re.compile("|".join(one.pattern for one in (MARKER, JOURNAL, ASIDE)))
"""Hidden objects of saves, copies and checkpoints that were set aside."""


def delete_checkpoint(
    uri: str | os.PathLike[str] | Target, *, dry_run: bool = False, **options: Any
) -> tuple[str, ...]:
    """Delete the checkpoint at ``uri``, ours or stock; returns the names of the objects deleted.

    With ``dry_run`` nothing is deleted, and the names are of what would be.

    ``.metadata`` goes first. A process that dies after that leaves objects that no reader sees and that gc
    removes. Objects that the metadata does not name, such as those of a save in progress, are left alone, and
    so are all of them where it can't be read.

    Raises:
        CheckpointNotFoundError: nothing is committed here.
        StorageError: the store could not be read, or not delete.
    """
    with open_store(Target.given("delete_checkpoint", uri, options)) as store:
        metadata, objects, listed = _committed(store)
        if not dry_run:
            store.delete(metadata)
            store.delete([*objects, *(info.name for info in listed if info.name == PIN)])
    return (*metadata, *objects)


def delete_unread(target: Target) -> bool:
    """Delete a checkpoint as `delete_checkpoint` does, unless it is pinned or a process is loading it.

    A process that begins to load it meanwhile finds all objects: they are left then, without metadata, for
    the next retention or gc.

    Returns:
        False if it is pinned or being loaded, or nothing is committed there any more. It was left alone then.

    Raises:
        StorageError: the store could not be read, or not delete.
    """
    with open_store(target) as store:
        pinned = start_task(partial(store.holds, PIN), concurrent=store.is_remote)
        try:
            metadata, objects, listed = _committed(store)
        except CheckpointNotFoundError:  # another process was faster
            return False
        # Pinned a moment ago, or a lease renewed, which the listing may not show yet.
        if pinned.result() or is_read(listed, silent_since(), store):
            return False
        store.delete(metadata)
        listed = store.list("", delimiter=True).objects
        if is_read(listed, silent_since(), store):
            _log.info("%s is deleted, but for the objects that a process is reading", one_line(store.uri))
        else:
            leases = [info.name for info in listed if READ_LEASE.fullmatch(info.name)]  # expired
            store.delete([*objects, *leases, *(info.name for info in listed if info.name == PIN)])
        return True


def delete_set_aside(target: Target, before: datetime) -> None:
    """Delete what was set aside here until ``before``, unless it is pinned or a process is reading there.

    Raises:
        StorageError: the store could not be read, or not delete.
    """
    with open_store(target) as store:
        listed = store.list("", delimiter=True).objects
        asides = [one for one in listed if ASIDE.fullmatch(one.name) and is_silent(one, before)]
        if asides and not (store.holds(PIN) or is_read(listed, silent_since(), store)):
            store.delete(sorted(objects_of(store, asides)))
            store.delete([one.name for one in asides])
            notice = found(store, NOTICE)
            if notice is not None and is_silent(notice, before):
                store.delete([NOTICE])
            _log.info("deleted what was set aside at %s", one_line(store.uri))


def delete_remains(target: Target) -> None:
    """Delete the data of a checkpoint whose deletion began: its metadata is gone.

    Nothing is deleted while a process loads it, or where the folder has another hidden object: the marker of
    a save, the journal of a copy, or metadata that was set aside. Plain reads confirm that the listing does
    not lack one of these, or the metadata.

    Raises:
        StorageError: the store could not be read, or not delete.
    """
    with open_store(target) as store:
        listed, since = store.list().objects, silent_since()
        names = [info.name for info in listed]
        leases = [name for name in names if READ_LEASE.fullmatch(name)]
        if any(md.is_metadata(name) or _TRACE.fullmatch(name) for name in names):
            return
        # The marker of a save may not be listed yet. What is younger than the listing may be a part of it.
        data = [info.name for info in listed if store.lists_at_once or is_silent(info, since)]
        data = [name for name in data if name.startswith(md.DATA_PREFIX) and name.endswith(md.DATA_SUFFIX)]
        if is_read(listed, since, store) or is_held(store, "", {info.name: info for info in listed}, since):
            return
        if (data or leases) and not store.holds(md.METADATA_NAME):
            store.delete([*data, *leases])


def _committed(store: ObjectStore) -> tuple[list[str], list[str], tuple[ObjectInfo, ...]]:
    """Return the metadata objects of a checkpoint, the data objects that they name, and what is listed.

    Raises:
        CheckpointNotFoundError: nothing is committed here.
    """
    # Ranks that saved without each other have metadata of their own.
    look = partial(commit.find_previous, store, md.METADATA_NAME)  # listed or not: a listing may lag behind
    looking = start_task(look, concurrent=True) if store.is_remote else None
    listed = store.list("", delimiter=True).objects
    read = {md.METADATA_NAME: look() if looking is None else looking.result()}
    for name in (info.name for info in listed if md.is_metadata(info.name)):
        if name != md.METADATA_NAME:
            read[name] = commit.find_previous(store, name)
    there = sorted(name for name, previous in read.items() if previous is not None)
    if not there:
        raise CheckpointNotFoundError(
            "there is no committed checkpoint to delete",
            uri=store.uri,
            hint=advice(store.uri, "Check the URI"),
        )
    objects = sorted({one for previous in read.values() if previous for one in previous.objects})
    return there, objects, listed
