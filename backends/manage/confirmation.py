"""Plain reads that confirm a listing before something is deleted on its word.

A listing may be minutes old. It may lack what was put since, show what was deleted since, and show a lease as
it was before its last renewal. A read of an object by its name shows what is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from cloudckpt.backends.copy.journal import JOURNAL_NAME
from cloudckpt.backends.errors import ObjectNotFoundError
from cloudckpt.backends.manage.set_aside import ASIDE, NOTICE
from cloudckpt.backends.save.save_lease import is_silent
from cloudckpt.backends.stores.base import ObjectInfo, ObjectStore

_RESOLUTION = timedelta(seconds=1)
"""Times in listings and in answers to single objects may be rounded differently."""


def leases_now(store: ObjectStore, listed: Iterable[ObjectInfo], since: datetime) -> list[ObjectInfo]:
    """Return listed leases as they are now, without those that have ended.

    Only a lease that the listing shows as not renewed after ``since`` is read.

    Raises:
        StorageError: the store could not be read.
    """
    now = (_now(store, info.name) if is_silent(info, since) else info for info in listed)
    return [info for info in now if info is not None]


def is_held(store: ObjectStore, folder: str, listed: Mapping[str, ObjectInfo], since: datetime) -> bool:
    """Return True if a folder has a recent copy or a checkpoint set aside that a listing does not show.

    Args:
        store: any that holds the folder.
        folder: a prefix of names, empty or with a ``/`` at its end.
        listed: what the listing shows, by name.
        since: the time from which on the listing may lack something.

    Raises:
        StorageError: the store could not be read.
    """
    journal = _now(store, folder + JOURNAL_NAME)
    if journal is not None and not is_silent(journal, since):
        shown = listed.get(folder + JOURNAL_NAME)
        if shown is None or _is_newer(journal, shown):
            return True
    notice = _now(store, folder + NOTICE)
    if notice is None or is_silent(notice, since):
        return False
    asides = [info for name, info in listed.items() if ASIDE.fullmatch(name.removeprefix(folder))]
    return all(_is_newer(notice, shown) for shown in asides)


def _now(store: ObjectStore, name: str) -> ObjectInfo | None:
    try:
        return store.stat(name)
    except ObjectNotFoundError:
        return None


def _is_newer(now: ObjectInfo, shown: ObjectInfo) -> bool:
    if now.modified is None or shown.modified is None:
        return True
    return now.modified - shown.modified > _RESOLUTION
