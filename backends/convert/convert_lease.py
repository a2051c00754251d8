"""The lease of a conversion: an object that names the files which the conversion is writing.

The user chooses the names of these files. Only the lease tells the open uploads of a killed conversion, and
its shards without an index, from those of another tool. The lease is put before the first upload, renewed
while the conversion lasts, and deleted at its end.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final

import pydantic
from pydantic import Field

from cloudckpt.backends.errors import ObjectNotFoundError, StorageError, UnsupportedError
from cloudckpt.backends.manage.confirmation import leases_now
from cloudckpt.backends.save.save_lease import SILENT_FOR, SaveLease, is_silent
from cloudckpt.backends.stores.base import ObjectStore, PendingUpload, Upload
from cloudckpt.backends.system import background_log

_log = background_log.logger(__name__)

_PREFIX: Final = ".cloudckpt-convert."
LEASE: Final = re.compile(rf"(?:.*/)?{re.escape(_PREFIX)}[0-9a-f]{{32}}")
"""Names of leases; each speaks of files in the folder that it is in."""

_File = Annotated[str, Field(pattern=r"^[^/]+$")]


@dataclass(frozen=True, slots=True)
class Plan:
    """The files that a conversion will write in one folder."""

    files: tuple[_File, ...]
    index: _File | None = None
    """The file that is put last, without which the others are no model."""
    replaced: tuple[_File, ...] = ()
    """Files that were there before."""


@dataclass(frozen=True, slots=True)
class _Document:
    files: tuple[_File, ...]
    index: _File | None
    replaced: tuple[_File, ...]
    process: int
    space: str
    """The scope of the process number: a boot of a machine, and a process namespace on it."""


_FORM: Final = pydantic.TypeAdapter(_Document)


@dataclass(frozen=True, slots=True)
class Left:
    """Uploads and objects that a dead conversion left. Names are relative to the store's root."""

    uploads: tuple[Upload, ...]
    objects: tuple[str, ...]
    """Whole files of a set whose index is missing."""


def take(store: ObjectStore, plan: Plan) -> SaveLease:
    """Put the lease of a conversion, and renew it until it ends.

    Raises:
        StorageError: it could not be put; nothing of the conversion may be sent then.
    """
    own_id = uuid.uuid4().hex
    notes = {"files": plan.files, "index": plan.index, "replaced": plan.replaced, "space": _space()}
    return SaveLease(store, own_id, 0, name=f"{_PREFIX}{own_id}", notes=notes)


def left_by(
    store: ObjectStore, name: str, visible: Collection[str], pending: Iterable[PendingUpload]
) -> Left:
    """Return what the conversion that put a lease left, if it is dead; nothing where the lease can't be read.

    Args:
        store: where it is.
        name: the lease's.
        visible: names of all objects in its folder.
        pending: uploads below its folder.

    Raises:
        StorageError: the store could not be read.
    """
    found = _read(store, name)
    if found is None:
        return Left((), ())
    folder = name[: name.rfind("/") + 1]
    files = {f"{folder}{one}" for one in found.files}
    uploads = tuple(one.upload for one in pending if one.upload.name in files)
    whole = found.index is None or f"{folder}{found.index}" in visible
    whole = whole or store.holds(f"{folder}{found.index}")  # a listing may not show it yet
    kept = {f"{folder}{one}" for one in found.replaced}
    return Left(uploads, () if whole else tuple(sorted((files & {*visible}) - kept)))


def remove_dead(store: ObjectStore, silent_for: timedelta = SILENT_FOR) -> None:
    """Remove what dead conversions left in a store's own folder, before another one writes there.

    A conversion is dead if its lease was not renewed for ``silent_for``, or its process on this machine has
    ended. What can't be removed is logged.
    """
    try:
        leases = [info for info in store.list(_PREFIX, delimiter=True).objects if LEASE.fullmatch(info.name)]
        bound = datetime.now(UTC) - silent_for
        leases = leases_now(store, leases, bound)
        dead = [info.name for info in leases if is_silent(info, bound) or _has_ended(store, info.name)]
        if not dead:
            return
        visible = {info.name for info in store.list("", delimiter=True).objects}
        for name in dead:
            # Of other files nothing is known, and a listing of their uploads may be long.
            files = () if (found := _read(store, name)) is None else found.files
            remove(store, left_by(store, name, visible, _pending(store, files)), [name])
    except StorageError as error:
        _log.warning("files or uploads of an earlier conversion could not be removed, and stay: %s", error)


def remove(store: ObjectStore, left: Left, leases: Sequence[str]) -> None:
    """Delete leases, without which a conversion that wakes up gives up, then what was left.

    Raises:
        StorageError: the store could not.
    """
    store.delete(leases)
    for upload in left.uploads:
        try:
            store.abort_upload(upload)
        except UnsupportedError as error:
            _log.warning("an upload of an earlier conversion stays pending: %s", error)
    store.delete(left.objects)


def _pending(store: ObjectStore, files: Iterable[str]) -> list[PendingUpload]:
    return [one for name in files for one in store.pending_uploads(name) if one.upload.name == name]


def _read(store: ObjectStore, name: str) -> _Document | None:
    try:
        return _FORM.validate_json(store.get(name)[0])
    except ObjectNotFoundError:
        return None
    except pydantic.ValidationError:
        _log.warning("%s: the lease of a conversion can't be read", store.uri)
        return None


def _has_ended(store: ObjectStore, name: str) -> bool:
    """Return True if a lease is of a process of this machine that is no more."""
    found = _read(store, name)
    if found is None or not found.space or found.space != _space():
        return False
    try:
        os.kill(found.process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _space() -> str:
    """Return what the numbers of processes are unique in; empty where the system does not tell."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""
