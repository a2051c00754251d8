"""Objects in the memory of one process, for tests and trials.

Visible objects live in fsspec's own memory file system, so that ``memory://name`` means the same to stock
``torch.distributed.checkpoint``, to fsspec and to this store: each reads what the other wrote. What is put
here is never changed in place, and every step is taken under one lock of this module, so conditions are
atomic among the stores of this module. Code that writes through fsspec itself does not take that lock.

Uploads are held here until they end. Nothing is shared with other processes: a store that is unpickled in
another process finds that process's objects.
"""

from __future__ import annotations

import itertools
import threading
import uuid
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import cast

from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import IntegrityError, ObjectNotFoundError, PreconditionFailedError
from cloudckpt.backends.stores.base import (
    Arrived,
    Capabilities,
    Condition,
    Create,
    Departed,
    Listing,
    ObjectInfo,
    ObjectStore,
    Overwrite,
    Part,
    PendingUpload,
    Update,
    Upload,
)
from cloudckpt.backends.stores.object_names import check_name
from cloudckpt.backends.stores.size_limit import check_whole


@dataclass(frozen=True, slots=True)
class _Pending:
    key: str
    started: datetime
    parts: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    """Offset and bytes by part number."""


_lock = threading.RLock()
_uploads: dict[str, _Pending] = {}
_serials = itertools.count(1)
_versions: weakref.WeakKeyDictionary[MemoryFile, int] = weakref.WeakKeyDictionary()


class MemoryStore(ObjectStore):
    """Objects of this process below ``memory://name``."""

    def __init__(self, target: Target) -> None:
        self._target, self._uri = target, target.uri
        self._root = f"{target.path.rstrip('/')}/"

    @property
    def _files(self) -> dict[str, MemoryFile]:
        return cast("dict[str, MemoryFile]", MemoryFileSystem.store)

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def lists_at_once(self) -> bool:
        return True

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(conditional_create=True, conditional_update=True)

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        key = self._key(name)
        with _lock:
            there = self._files.get(key)
            match condition:
                case Overwrite():
                    pass
                case Create():
                    self._refuse_existing(name, there)
                case Update(version):
                    if there is None or _version(there) != version:
                        raise PreconditionFailedError(
                            "the object is not the version expected", uri=self._uri, object_name=name
                        )
            return self._publish(name, data)

    def get(self, name: str) -> tuple[bytes, ObjectInfo]:
        with _lock:
            file = self._file(name)
            check_whole(self._target, name, file.getbuffer().nbytes)
            return file.getvalue(), self._info(name, file)

    def read_into(
        self,
        name: str,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        arrived: Arrived | None = None,
    ) -> int:
        del arrived  # all of them at once
        with _lock:
            data = self._file(name).getbuffer()
        with data:
            for buffer in buffers:
                if offset + len(buffer) > len(data):
                    raise IntegrityError(
                        f"the object has {len(data)} bytes and should go on", uri=self._uri, object_name=name
                    )
                buffer[:] = data[offset : offset + len(buffer)]
                offset += len(buffer)
            return len(data)

    def stat(self, name: str) -> ObjectInfo:
        with _lock:
            return self._info(name, self._file(name))

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        start = self._root + prefix
        objects, prefixes = [], set()
        with _lock:
            for key, file in sorted(self._files.items()):
                if not key.startswith(start):
                    continue
                folder, slash, _ = key[len(start) :].partition("/")
                if delimiter and slash:
                    prefixes.add(f"{prefix}{folder}/")
                else:
                    objects.append(self._info(key[len(self._root) :], file))
        return Listing(tuple(objects), tuple(sorted(prefixes)))

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            key = self._key(name)
            with _lock:
                self._files.pop(key, None)

    def begin_upload(self, name: str) -> Upload:
        upload = Upload(name, uuid.uuid4().hex)
        with _lock:
            _uploads[upload.upload_id] = _Pending(self._key(name), datetime.now(UTC))
        return upload

    def upload_part(
        self,
        upload: Upload,
        number: int,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        checksum: str | None = None,
        departed: Departed | None = None,
    ) -> Part:
        del checksum, departed  # no server checks it, and all goes out at once
        data = b"".join(buffers)
        with _lock:
            self._pending(upload).parts[number] = (offset, data)
        return Part(number, len(data))

    def complete_upload(self, upload: Upload, parts: Sequence[Part], *, confirm: bool = True) -> ObjectInfo:
        del confirm  # it is done on the way
        with _lock:
            held = self._pending(upload).parts
            position, pieces = 0, []
            for index, part in enumerate(sorted(parts, key=lambda part: part.number), start=1):
                offset, data = held.get(part.number, (None, b""))
                if (part.number, position, part.size) != (index, offset, len(data)):
                    raise IntegrityError(
                        f"part {part.number} is not held as it was sent",
                        uri=self._uri,
                        object_name=upload.name,
                    )
                pieces.append(data)
                position += len(data)
            if len(pieces) != len(held):
                raise IntegrityError(
                    f"{len(held)} parts are held and {len(pieces)} are accounted for",
                    uri=self._uri,
                    object_name=upload.name,
                )
            self._refuse_existing(upload.name, self._files.get(self._key(upload.name)))
            info = self._publish(upload.name, b"".join(pieces))
            del _uploads[upload.upload_id]
            return info

    def abort_upload(self, upload: Upload) -> None:
        with _lock:
            _uploads.pop(upload.upload_id, None)

    def pending_uploads(self, prefix: str = "") -> Iterator[PendingUpload]:
        with _lock:
            held = list(_uploads.items())
        for upload_id, pending in held:
            if pending.key.startswith(self._root + prefix):
                yield PendingUpload(Upload(pending.key[len(self._root) :], upload_id), pending.started)

    def _key(self, name: str) -> str:
        return self._root + check_name(name, self._uri)

    def _file(self, name: str) -> MemoryFile:
        file = self._files.get(self._key(name))
        if file is None:
            raise ObjectNotFoundError("there is no such object", uri=self._uri, object_name=name)
        return file

    def _pending(self, upload: Upload) -> _Pending:
        pending = _uploads.get(upload.upload_id)
        if pending is None or pending.key != self._key(upload.name):
            raise ObjectNotFoundError(
                "the upload was completed or aborted before", uri=self._uri, object_name=upload.name
            )
        return pending

    def _refuse_existing(self, name: str, there: MemoryFile | None) -> None:
        if there is not None:
            raise PreconditionFailedError("the object exists already", uri=self._uri, object_name=name)

    def _publish(self, name: str, data: bytes) -> ObjectInfo:
        key = self._key(name)
        file = MemoryFile(MemoryFileSystem(), key, data)
        self._files[key] = file
        return self._info(name, file)

    def _info(self, name: str, file: MemoryFile) -> ObjectInfo:
        return ObjectInfo(name, _size(file), _version(file), file.modified)


def _size(file: MemoryFile) -> int:
    with file.getbuffer() as data:
        return len(data)


def _version(file: MemoryFile) -> str:
    serial = _versions.get(file)
    if serial is None:  # not seen before; perhaps written through fsspec
        serial = _versions[file] = next(_serials)
    return f"{serial}-{_size(file)}"
