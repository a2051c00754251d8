"""Objects as files below a folder.

An object is written to a hidden file beside its final name and made visible in one step of the file system:
a hard link where nothing may be replaced, a rename where it may. (On an object store a rename is a copy;
within a folder it is the atomic step.) Before it, the file's bytes are flushed; after it, the folder. So
after a crash an object is there whole or not at all.

A multipart upload is such a hidden file, ``.<name>.<upload id>.partial``, and parts are written to it at
their offsets by any process that sees the folder. Each process flushes the parts that it wrote, for on a
network file system another one could not.

Conditions are atomic among processes that use this store: ``Create`` by the file system itself, ``Update``
under a lock of the object's folder.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import IntegrityError, ObjectNotFoundError, PreconditionFailedError
from cloudckpt.backends.stores.base import (
    Arrived,
    Capabilities,
    Condition,
    Create,
    Departed,
    EmptyFolder,
    Listing,
    ObjectInfo,
    ObjectStore,
    Overwrite,
    Part,
    PendingUpload,
    Update,
    Upload,
)
from cloudckpt.backends.stores.buffer_batches import runs
from cloudckpt.backends.stores.local import durable_io
from cloudckpt.backends.stores.local.errors import NOT_THERE, translated
from cloudckpt.backends.stores.local.paths import Tree
from cloudckpt.backends.stores.object_names import STEP
from cloudckpt.backends.stores.size_limit import check_whole
from cloudckpt.backends.system import descriptors

_OPEN_TRIES = 20
_WINDOW = 1 << 18
"""Bytes read at once: few enough to be in the cache still when ``arrived`` is called."""


class LocalStore(ObjectStore):
    """Objects as files below the folder of a ``file://`` URI."""

    def __init__(self, target: Target) -> None:
        self._target, self._uri = target, target.uri
        self._root = Path(target.path)
        self._tree = Tree(self._uri, self._root)
        self._made_root = self._is_anchored = False

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_made_root": False, "_is_anchored": False}

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
        with self._errors(name, writing=True), self._putting(name) as (hidden, fd):
            durable_io.write_fully(fd, 0, [memoryview(data)])
            return self._publish(fd, hidden, name, condition)

    def get(self, name: str) -> tuple[bytes, ObjectInfo]:
        with self._errors(name), self._reading(name) as fd:
            info = _info(name, os.fstat(fd))
            check_whole(self._target, name, info.size)
            data = bytearray(info.size)
            self._fill(name, fd, 0, [memoryview(data)])
            return bytes(data), info

    def read_into(
        self,
        name: str,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        arrived: Arrived | None = None,
    ) -> int:
        with self._errors(name), self._reading(name) as fd:
            self._fill(name, fd, offset, buffers, arrived)
            return os.fstat(fd).st_size

    def stat(self, name: str) -> ObjectInfo:
        with self._errors(name), self._reading(name) as fd:
            return _info(name, os.fstat(fd))

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        objects, prefixes = [], []
        with self._errors(None):
            for name, entry in self._tree.children(prefix) if delimiter else self._tree.objects(prefix):
                if entry is None:
                    prefixes.append(name)
                    continue
                with contextlib.suppress(FileNotFoundError):  # deleted in the meantime
                    objects.append(_info(name, entry.stat()))
        objects.sort(key=lambda info: info.name)
        return Listing(tuple(objects), tuple(sorted(prefixes)))

    def delete(self, names: Iterable[str]) -> None:
        folders: dict[Path, str] = {}
        for name in names:
            with self._errors(name):
                path = self._tree.path(name)
                try:
                    with durable_io.locked(path.parent, needed=False):
                        path.unlink()
                except OSError as error:
                    if error.errno not in NOT_THERE:
                        raise
                else:
                    folders[path.parent] = name
        for folder, name in folders.items():
            with self._errors(name):
                with contextlib.suppress(
                    FileNotFoundError
                ):  # removed with an object of it by another process
                    durable_io.sync_folder(folder)
                self._remove_empty(folder)

    def begin_upload(self, name: str) -> Upload:
        upload = Upload(name, uuid.uuid4().hex)
        with self._errors(name, writing=True):
            os.close(self._create(self._tree.hidden(upload)))
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
        del checksum  # no server checks it
        with self._errors(upload.name, writing=True), self._pending(upload) as fd:
            if self._is_published(upload.name, fd):
                raise self._ended(upload)
            size = 0
            for run in runs(buffers, _WINDOW):
                size += durable_io.write_fully(fd, offset + size, run)
                if departed is not None:
                    departed(size)
            os.fdatasync(fd)
        return Part(number, size, etag=_etag(offset, size))

    def complete_upload(self, upload: Upload, parts: Sequence[Part], *, confirm: bool = True) -> ObjectInfo:
        del confirm  # it is done on the way
        with self._errors(upload.name, writing=True):
            hidden = self._tree.hidden(upload)
            with self._pending(upload) as fd:
                if self._is_published(
                    upload.name, fd
                ):  # by a process that died before it removed the hidden name
                    info = _info(upload.name, os.fstat(fd))
                else:
                    self._check_parts(upload.name, parts, os.fstat(fd).st_size)
                    info = self._publish(fd, hidden, upload.name, Create())
            self._remove(hidden)
            return info

    def abort_upload(self, upload: Upload) -> None:
        with self._errors(upload.name):
            hidden = self._tree.hidden(upload)
            with durable_io.unused(hidden) as unused:
                if unused:  # else it is no upload, but a put in progress
                    self._remove(hidden)

    def pending_uploads(self, prefix: str = "") -> Iterator[PendingUpload]:
        """List uploads, and puts whose process died. A put in progress holds a lock, and is not listed."""
        with self._errors(None):
            for upload, entry in self._tree.uploads(prefix):
                with contextlib.suppress(FileNotFoundError):  # ended in the meantime
                    started = _time(entry.stat(follow_symlinks=False))
                    if not durable_io.is_locked(Path(entry.path)):
                        yield PendingUpload(upload, started)

    def empty_folders(self) -> Iterator[EmptyFolder]:
        with self._errors(None):
            for name, entry in self._tree.empty_folders():
                with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                    yield EmptyFolder(name, _time(entry.stat(follow_symlinks=False)))

    def remove_empty_folder(self, name: str) -> None:
        with self._errors(name):
            folder = self._tree.path(name)
            durable_io.remove_empty_folders(folder, below=folder.parent)

    def copy_from(self, source: ObjectStore, info: ObjectInfo) -> ObjectInfo | None:
        """By the kernel: within one file system that shares blocks, no byte is moved."""
        if not isinstance(source, LocalStore):
            return None
        name = info.name
        with (
            source._errors(name),  # noqa: SLF001 - of this class
            source._reading(name) as original,  # noqa: SLF001
            self._errors(name, writing=True),
            self._putting(name) as (hidden, fd),
        ):
            copied = durable_io.copy_whole(original, fd, info.size)
            if not copied or _info(name, os.fstat(original)).version != info.version:
                return None
            return self._publish(fd, hidden, name, Overwrite())

    @contextlib.contextmanager
    def _putting(self, name: str) -> Iterator[tuple[Path, int]]:
        """Create a hidden file, hold its lock for a put, and remove its hidden name afterwards."""
        while True:
            hidden = self._tree.hidden(Upload(name, uuid.uuid4().hex))
            fd = self._create(hidden)
            try:
                durable_io.lock(fd)
                if not os.path.lexists(hidden):  # aborted by another process before it was locked
                    continue
                try:
                    yield hidden, fd
                finally:
                    self._remove(hidden)
                return
            finally:
                os.close(fd)

    def _create(self, hidden: Path) -> int:
        """Create an empty hidden file and the missing folders above it; return its open descriptor."""
        for attempt in range(_OPEN_TRIES):
            try:
                self._made_root |= not self._root.is_dir()
                durable_io.make_folders(hidden.parent)
                if not self._is_anchored:
                    durable_io.sync_above(self._root)
                    self._is_anchored = True
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                return descriptors.opened(hidden, flags)
            except FileNotFoundError:  # another process removed the folder, which was empty until now
                if attempt == _OPEN_TRIES - 1:
                    raise
        raise AssertionError  # the last attempt returned or raised

    def _publish(self, fd: int, hidden: Path, name: str, condition: Condition) -> ObjectInfo:
        """Make the bytes of a hidden file durable, then visible on the condition, then that durable."""
        path = self._tree.path(name)
        # The kernel's own stamps are coarse: two writes in a tick on a reused inode would share a version.
        os.utime(fd, ns=(time.time_ns(), time.time_ns()))
        os.fsync(fd)
        # The lock is for updates: they compare and replace in one step only if nothing else is put meanwhile.
        with durable_io.locked(path.parent, needed=isinstance(condition, Update)):
            match condition:
                case Overwrite():
                    hidden.replace(path)
                case Create():
                    try:
                        path.hardlink_to(hidden)
                    except FileExistsError as error:
                        raise PreconditionFailedError(
                            "the object exists already", uri=self._uri, object_name=name
                        ) from error
                case Update(version):
                    if self._version(name) != version:
                        raise PreconditionFailedError(
                            "the object is not the version expected", uri=self._uri, object_name=name
                        )
                    hidden.replace(path)
        with contextlib.suppress(FileNotFoundError):  # another process deleted the object and its folder
            durable_io.sync_folders(path.parent, self._root)
        return _info(name, os.fstat(fd))

    def _version(self, name: str) -> str | None:
        try:
            return self.stat(name).version
        except ObjectNotFoundError:
            return None

    @contextlib.contextmanager
    def _pending(self, upload: Upload) -> Iterator[int]:
        """Open the hidden file of an upload."""
        try:
            fd = descriptors.opened(self._tree.hidden(upload), os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            raise self._ended(upload) from error
        try:
            yield fd
        finally:
            os.close(fd)

    def _ended(self, upload: Upload) -> ObjectNotFoundError:
        return ObjectNotFoundError(
            "the upload was completed or aborted before", uri=self._uri, object_name=upload.name
        )

    def _is_published(self, name: str, fd: int) -> bool:
        try:
            return os.path.samestat(self._tree.path(name).stat(), os.fstat(fd))
        except FileNotFoundError:
            return False

    def _check_parts(self, name: str, parts: Sequence[Part], held: int) -> None:
        position = 0
        for index, part in enumerate(sorted(parts, key=lambda part: part.number), start=1):
            if (part.number, part.etag) != (index, _etag(position, part.size)):
                raise IntegrityError(
                    f"part {part.number} is not the one that starts at byte {position}",
                    uri=self._uri,
                    object_name=name,
                )
            position += part.size
        if position != held:
            raise IntegrityError(
                f"{held} bytes are held and the parts add up to {position}", uri=self._uri, object_name=name
            )

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[int]:
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        with durable_io.opened(self._tree.path(name), os.O_RDONLY | os.O_NONBLOCK) as fd:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ObjectNotFoundError("this is not a file", uri=self._uri, object_name=name)
            yield fd

    def _fill(
        self,
        name: str,
        fd: int,
        offset: int,
        buffers: Sequence[memoryview],
        arrived: Arrived | None = None,
    ) -> None:
        end = offset + sum(buffer.nbytes for buffer in buffers)
        at = offset
        for run in runs(buffers, _WINDOW):
            got = durable_io.read_fully(fd, at, run)
            at += got
            if got < sum(piece.nbytes for piece in run):
                raise IntegrityError(
                    f"the object ends at byte {at}, before byte {end}", uri=self._uri, object_name=name
                )
            if arrived is not None:
                arrived(at - offset)

    def _remove(self, hidden: Path) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            hidden.unlink()
            self._remove_empty(hidden.parent)

    def _remove_empty(self, folder: Path) -> None:
        """Remove a folder and those above it that are empty now.

        The root stays, unless this store made it or its name is that of a step, which a run made.
        """
        may_remove_root = self._made_root or STEP.fullmatch(self._root.name) is not None
        durable_io.remove_empty_folders(folder, below=self._root.parent if may_remove_root else self._root)

    def _errors(self, name: str | None, *, writing: bool = False) -> contextlib.AbstractContextManager[None]:
        return translated(self._uri, name, writing=writing)


def _etag(offset: int, size: int) -> str:
    return f"{offset}+{size}"


def _time(status: os.stat_result) -> datetime:
    return datetime.fromtimestamp(status.st_mtime, UTC)


def _info(name: str, status: os.stat_result) -> ObjectInfo:
    version = f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
    return ObjectInfo(name, status.st_size, version, _time(status))
