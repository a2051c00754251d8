"""Deleting a checkpoint: ``.metadata`` first, which ends it for every reader, and then its objects."""

from __future__ import annotations

import os
from datetime import datetime
from functools import partial
from typing import Any

from cloudckpt.backends import background_log, commit
from cloudckpt.backends import metadata as md
from cloudckpt.backends.errors import CheckpointNotFoundError
from cloudckpt.backends.marker import is_silent, silent_since
from cloudckpt.backends.printable import one_line
from cloudckpt.backends.read_lease import READ_LEASE, is_read
from cloudckpt.backends.set_aside import ASIDE, objects_of
from cloudckpt.backends.side_by_side import begun
from cloudckpt.backends.store import ObjectInfo, ObjectStore
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.names import PIN
from cloudckpt.backends.target import Target
from cloudckpt.backends.uri_hints import advice

_log = background_log.logger(__name__)


def delete_checkpoint(
    uri: str | os.PathLike[str] | Target, *, dry_run: bool = False, **options: Any
) -> tuple[str, ...]:
    """Delete the checkpoint at ``uri``, ours or stock; returns the names of the objects deleted.

    With ``dry_run`` nothing is deleted, and the names are of what would be.

    ``.metadata`` goes first. Whoever dies after that leaves objects that no reader sees and that gc removes.
    Objects that the metadata does not name, such as those of a save in progress, are left alone, and so are
    all of them where it can't be read.

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
    """Delete a checkpoint as `delete_checkpoint` does, unless a process is loading it.

    A process that begins to load it meanwhile finds all objects: they are left then, without metadata, for
    the next retention or gc.

    Returns:
        False if it is being loaded, or nothing is committed there any more. It was left alone then.

    Raises:
        StorageError: the store could not be read, or not delete.
    """
    with open_store(target) as store:
        try:
            metadata, objects, listed = _committed(store)
        except CheckpointNotFoundError:  # another process was faster
            return False
        if is_read(listed, silent_since()):
            return False
        store.delete(metadata)
        listed = store.list("", delimiter=True).objects
        if is_read(listed, silent_since()):
            _log.info("%s is deleted, but for the objects that a process is reading", one_line(store.uri))
        else:
            leases = [info.name for info in listed if READ_LEASE.fullmatch(info.name)]  # expired
            store.delete([*objects, *leases, *(info.name for info in listed if info.name == PIN)])
        return True


def delete_set_aside(target: Target, before: datetime) -> None:
    """Delete the checkpoints that were set aside here until ``before``, unless a process is reading there.

    Raises:
        StorageError: the store could not be read, or not delete.
    """
    with open_store(target) as store:
        listed = store.list("", delimiter=True).objects
        asides = [one for one in listed if ASIDE.fullmatch(one.name) and is_silent(one, before)]
        if asides and not is_read(listed, silent_since()):
            store.delete(sorted(objects_of(store, asides)))
            store.delete([one.name for one in asides])
            _log.info("deleted what was set aside at %s", one_line(store.uri))


def _committed(store: ObjectStore) -> tuple[list[str], list[str], tuple[ObjectInfo, ...]]:
    """Return the metadata objects of a checkpoint, the data objects that they name, and what is listed.

    Raises:
        CheckpointNotFoundError: nothing is committed here.
    """
    # Ranks that saved without each other have metadata of their own.
    look = partial(commit.find_previous, store, md.METADATA_NAME)  # listed or not: a listing may lag behind
    looking = begun(look, concurrent=True) if store.is_remote else None
    listed = store.list("", delimiter=True).objects
    found = {md.METADATA_NAME: look() if looking is None else looking.result()}
    for name in (info.name for info in listed if md.is_metadata(info.name)):
        if name != md.METADATA_NAME:
            found[name] = commit.find_previous(store, name)
    there = sorted(name for name, previous in found.items() if previous is not None)
    if not there:
        raise CheckpointNotFoundError(
            "there is no committed checkpoint to delete",
            uri=store.uri,
            hint=advice(store.uri, "Check the URI"),
        )
    objects = sorted({one for previous in found.values() if previous for one in previous.objects})
    return there, objects, listed
