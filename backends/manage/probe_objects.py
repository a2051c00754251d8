"""Objects that an examination of a store puts there, remembered so that all of them can be deleted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

from cloudckpt.backends.errors import CheckpointError, ObjectNotFoundError
from cloudckpt.backends.stores.base import ObjectStore, Part, Upload
from cloudckpt.backends.stores.object_names import PROBE, PROBE_PREFIX, probe_name


class ProbeObjects:
    """The hidden objects and open uploads of one trial of a store.

    Their names are those of a probe: what stays behind all the same, ``gc`` knows and removes.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._names: list[str] = []
        self._open: dict[Upload, list[Part]] = {}
        self._unsure: set[str] = set()
        """Names under which an upload may have been started without an answer."""

    @property
    def is_empty(self) -> bool:
        """True if nothing was put or started yet."""
        return not self._names

    def name(self) -> str:
        """Return a new name, under which something will be put or started."""
        self._names.append(name := probe_name())
        return name

    def begin_upload(self, name: str) -> Upload:
        """Begin an upload under such a name."""
        self._unsure.add(name)
        upload = self._store.begin_upload(name)
        self._unsure.discard(name)
        self._open[upload] = []
        return upload

    def upload_part(self, upload: Upload, number: int, offset: int, data: bytes) -> Part:
        """Send a part of it."""
        part = self._store.upload_part(upload, number, offset, [memoryview(data)])
        self._open[upload].append(part)
        return part

    def adopt(self, uploads: Iterable[Upload], unsure: Iterable[str] = ()) -> None:
        """Take over uploads that another part has started under such names, or may have."""
        self._open |= {upload: [] for upload in uploads}
        self._unsure.update(unsure)

    def ended(self, upload: Upload) -> None:
        """Know that an upload was completed or aborted."""
        self._open.pop(upload, None)

    def clear(self) -> tuple[str, ...]:
        """Take everything away, and return the names of what could not be."""
        kept = {upload: parts for upload, parts in self._open.items() if not self._is_ended(upload, parts)}
        left = {upload.name for upload in kept}
        for name in self._unsure:
            with contextlib.suppress(CheckpointError):
                for pending in list(self._store.pending_uploads(name)):
                    if pending.upload not in self._open:
                        self._store.abort_upload(pending.upload)
        try:
            self._store.delete(self._names)
        except CheckpointError:
            left |= set(filter(self._is_there, {*self._names, *self._others()}))
        self._names, self._open, self._unsure = sorted(left), kept, set()  # for another try
        return tuple(self._names)

    def _is_ended(self, upload: Upload, parts: Sequence[Part]) -> bool:
        with contextlib.suppress(CheckpointError):
            self._store.abort_upload(upload)
            return True
        # Who may not abort it may complete it, and delete the object.
        with contextlib.suppress(CheckpointError):
            if parts:
                self._store.complete_upload(upload, parts, confirm=False)
                return True
        return False

    def _others(self) -> list[str]:
        """Return the names that the store's own probe could not delete."""
        with contextlib.suppress(CheckpointError):
            return [
                info.name for info in self._store.list(PROBE_PREFIX).objects if PROBE.fullmatch(info.name)
            ]
        return []

    def _is_there(self, name: str) -> bool:
        try:
            self._store.stat(name)
        except ObjectNotFoundError:
            return False
        except CheckpointError:  # unknown
            return True
        return True
