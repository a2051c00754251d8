"""Garbage: what saves that died left below a prefix, and nothing else.

A save that is killed can't clean up after itself. It leaves open uploads, and if it died inside the commit,
data objects that no ``.metadata`` names. Both are invisible to every reader and cost money. Only names that
this library gives are ever touched.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cloudckpt.backends import metadata as md
from cloudckpt.backends.errors import IntegrityError, ObjectNotFoundError, UnsafeCheckpointError
from cloudckpt.backends.store import ObjectInfo, ObjectStore
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.target import Target

_log = logging.getLogger(__name__)

_DATA = re.compile(r"(?P<folder>(?:.*/)?)__\d+_\d+\.[0-9a-f]{32}\.distcp")
_METADATA = re.compile(r"(?P<folder>(?:.*/)?)(?:__\d+)?\.metadata")


@dataclass(frozen=True, slots=True)
class Garbage:
    """What was removed, or with ``dry_run`` would be. Names are relative to the URI."""

    uploads: tuple[str, ...]
    """Objects whose upload was pending."""
    objects: tuple[str, ...]
    """Data objects that no checkpoint names."""
    size: int
    """Bytes of ``objects``."""


def collect_garbage(
    uri: str | os.PathLike[str],
    *,
    older_than: timedelta = timedelta(days=1),
    dry_run: bool = False,
    **options: Any,
) -> Garbage:
    """Remove what saves that died left below ``uri``, which may be a checkpoint or a whole run.

    Age is all that tells a dead save from one in progress: ``older_than`` must be longer than any save
    takes, unless nothing saves there at the moment. A folder whose ``.metadata`` can't be read is left
    alone.

    Raises:
        StorageError: the store could not list or delete.
    """
    with open_store(Target.parse(uri, **options)) as store:
        # Uploads first, then objects, then metadata: a save that commits meanwhile is seen as committed.
        bound = datetime.now(UTC) - older_than
        pending = [
            p for p in store.pending_uploads() if _is_ours(p.upload.name) and _is_old(p.started, bound)
        ]
        listing = store.list().objects
        old = [info for info in listing if _DATA.fullmatch(info.name) and _is_old(info.modified, bound)]
        unnamed = _unnamed(store, old, listing)
        if not dry_run:
            for one in pending:
                store.abort_upload(one.upload)
            store.delete(info.name for info in unnamed)
    return Garbage(
        tuple(sorted(p.upload.name for p in pending)),
        tuple(sorted(info.name for info in unnamed)),
        sum(info.size for info in unnamed),
    )


def _is_ours(name: str) -> bool:
    return bool(_DATA.fullmatch(name) or _METADATA.fullmatch(name))


def _is_old(when: datetime | None, bound: datetime) -> bool:
    return when is not None and when <= bound


def _unnamed(store: ObjectStore, old: list[ObjectInfo], listing: Iterable[ObjectInfo]) -> list[ObjectInfo]:
    """Of ``old``, those that no metadata in their folder names; none where that can't be read."""
    candidates: defaultdict[str, list[ObjectInfo]] = defaultdict(list)
    for info in old:
        candidates[_folder(_DATA, info.name)].append(info)
    metadata: defaultdict[str, list[str]] = defaultdict(list)
    for info in listing:
        if _METADATA.fullmatch(info.name):
            metadata[_folder(_METADATA, info.name)].append(info.name)
    unnamed: list[ObjectInfo] = []
    for folder, infos in candidates.items():
        # The listing may be older than a commit, so the plain name is always asked for.
        names = {folder + md.METADATA_NAME, *metadata[folder]}
        try:
            named = frozenset[str]().union(*(_named(store, folder, name) for name in names))
        except (IntegrityError, UnsafeCheckpointError) as error:
            _log.warning("left alone, because its metadata cannot be read: %s", error)
            continue
        unnamed += [info for info in infos if info.name not in named]
    return unnamed


def _folder(pattern: re.Pattern[str], name: str) -> str:
    match = pattern.fullmatch(name)
    return match["folder"] if match else ""


def _named(store: ObjectStore, folder: str, name: str) -> frozenset[str]:
    try:
        data, _ = store.get(name)
    except ObjectNotFoundError:
        return frozenset()
    return frozenset(folder + named for named in md.objects_of(md.load(data, uri=store.uri, name=name)))
