"""Objects at the destination of a copy: those that an earlier copy left, and whether all are still there.

A listing may show an object that gc has deleted since, which would be missing from the copy. An object that
this copy did not send itself is therefore read by its name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

from cloudckpt.backends.copy.journal import Entry
from cloudckpt.backends.copy.object_copy import is_unique
from cloudckpt.backends.errors import CommitError, ObjectNotFoundError
from cloudckpt.backends.save.object_checks import found
from cloudckpt.backends.stores.base import ObjectInfo, ObjectStore
from cloudckpt.backends.transfer.task_pool import run_all


def held_of(store: ObjectStore, names: Iterable[str], concurrency: int) -> dict[str, ObjectInfo]:
    """Return the objects that are at the destination under the names to copy.

    Raises:
        StorageError: the store could not be read.
    """
    wanted = {*names}
    listed = [info.name for info in store.list().objects if info.name in wanted]
    held = run_all([functools.partial(found, store, name) for name in listed], concurrency)
    return {info.name: info for info in held if info is not None}


def is_same(info: ObjectInfo, held: ObjectInfo, entry: Entry | None) -> bool:
    """Return True if the object at the destination is the right one, by its name or by the journal."""
    if held.size != info.size:
        return False
    if is_unique(info.name):
        return True
    noted = entry is not None and entry.done is not None and entry.version == info.version
    return noted and entry is not None and entry.done == (held.version or "")


def ensure_there(store: ObjectStore, objects: Mapping[str, ObjectInfo], reused: AbstractSet[str]) -> None:
    """Make sure that every object is still there, also those that an earlier copy left: ``reused``.

    Those, and objects whose names other checkpoints may have, are read one by one: a listing may show them as
    they were.

    Raises:
        CommitError: one is not, or has another size; or was put by another copy, under a name of stock DCP.
    """
    listed = {info.name: info for info in store.list().objects if _is_shown(info.name, reused)}
    for name, info in objects.items():
        now: ObjectInfo | None
        try:
            now = listed[name] if name in listed else store.stat(name)  # a listing may lag behind
        except ObjectNotFoundError:
            now = None
        if now is None or now.size != info.size or not (is_unique(name) or _is_version(now, info)):
            raise CommitError(
                "an object is gone, or is another one, that had arrived",
                uri=store.uri,
                object_name=name,
                hint="Nothing was committed: copy again",
            )


def _is_shown(name: str, reused: AbstractSet[str]) -> bool:
    """Return True if a listing that shows an object tells enough: no other copy can have put or left it."""
    return is_unique(name) and name not in reused


def _is_version(now: ObjectInfo, then: ObjectInfo) -> bool:
    return now.version is None or then.version is None or now.version == then.version
