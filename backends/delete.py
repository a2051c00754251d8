"""Deleting a checkpoint: it stops to exist in one step, and then its objects go."""

from __future__ import annotations

import os
from typing import Any

from cloudckpt.backends import commit
from cloudckpt.backends import metadata as md
from cloudckpt.backends.errors import CheckpointNotFoundError
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.names import PIN
from cloudckpt.backends.target import Target
from cloudckpt.backends.uri_hints import advice


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
        # Ranks that saved without each other have metadata of their own.
        listed = [info.name for info in store.list("", delimiter=True).objects]
        names = [name for name in listed if md.is_metadata(name)]
        if md.METADATA_NAME not in names:  # a listing may lag behind
            names.append(md.METADATA_NAME)
        found = {name: commit.find_previous(store, name) for name in names}
        there = sorted(name for name, previous in found.items() if previous is not None)
        if not there:
            raise CheckpointNotFoundError(
                "there is no committed checkpoint to delete",
                uri=store.uri,
                hint=advice(store.uri, "Check the URI"),
            )
        objects = sorted({one for previous in found.values() if previous for one in previous.objects})
        if not dry_run:
            store.delete(there)
            store.delete([*objects, *(name for name in listed if name == PIN)])
    return (*there, *objects)
