"""Looks at the objects of a save: whether they are there, and their sizes by one listing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

from cloudckpt.backends.errors import ObjectNotFoundError, StorageError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.stores.base import ObjectInfo, ObjectStore
from cloudckpt.backends.system import background_log
from cloudckpt.backends.transfer.task_pool import outcomes_of

ASKED_ONE_BY_ONE: Final = 64
"""Objects up to which each is asked for its size; a listing tells the sizes of a thousand at a time."""

_log = background_log.logger(__name__)


def missing(store: ObjectStore, objects: Sequence[ObjectInfo], concurrency: int) -> str | None:
    """Return the name of an object that is gone; None where the store does not say so of any."""
    if len(objects) > ASKED_ONE_BY_ONE:
        try:
            listed = listed_sizes(store)
        except StorageError as error:
            _log.warning("the objects of a save could not be looked at after its commit: %s", error)
            return None
        objects = [info for info in objects if listed.get(info.name) != info.size]
    gone_of = outcomes_of([functools.partial(_is_gone, store, info) for info in objects], concurrency)
    for info, gone in zip(objects, gone_of, strict=True):
        if gone is True:
            return info.name
        if isinstance(gone, StorageError):
            _log.warning("an object could not be looked at after the commit: %s", gone)
        elif isinstance(gone, BaseException):
            raise gone
    return None


def _is_gone(store: ObjectStore, info: ObjectInfo) -> bool:
    there = found(store, info.name)
    if there is None or there.size != info.size:
        return True
    return bool(there.version and info.version) and there.version != info.version


def found(store: ObjectStore, name: str) -> ObjectInfo | None:
    """Return what is visible under a name, None where nothing is."""
    try:
        return store.stat(name)
    except ObjectNotFoundError:
        return None


def listed_sizes(store: ObjectStore) -> dict[str, int]:
    """Return the sizes of the data objects, by name."""
    return {info.name: info.size for info in store.list(md.DATA_PREFIX).objects}
