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
import errno
import os
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cloudckpt.backends.errors import (
    AccessDeniedError,
    CheckpointError,
    IntegrityError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
)
from cloudckpt.backends.store import (
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
from cloudckpt.backends.stores import files
from cloudckpt.backends.stores.runs import runs
from cloudckpt.backends.stores.tree import Tree
from cloudckpt.backends.target import Target

_OPEN_TRIES = 20
_WINDOW = 1 << 18
"""Bytes read at once: few enough to be in the cache still for whoever hears that they have arrived."""

_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_RIGHTS = "Give this user the right to read and write the folder"
_HINTS = {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "The file system is mounted read-only",
    errno.ENOTDIR: "A file stands where a folder is needed: use another URI or move the file away",
    errno.EISDIR: "A folder stands where an object is wanted: use another URI or move the folder away",
    errno.ENOSPC: "Make room on the file system, then save again",
    errno.EDQUOT: "The disk quota is used up: make room, then save again",
    errno.EFBIG: "The file system or a limit of the process allows no file of this size",
    errno.ENAMETOOLONG: "Shorten the name: a hidden file beside it needs 42 bytes more",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
    errno.EOPNOTSUPP: "The file system lacks hard links or locks, without which no condition can be kept",
    errno.ENOLCK: "The file system lacks locks on folders, without which an update can't be conditional",
    errno.EIO: "The disk or the network file system fails",
    errno.ESTALE: "The network file system dropped the file: save again",
}


class LocalStore(ObjectStore):
    """Objects as files below the folder of a ``file://`` URI."""

    def __init__(self, target: Target) -> None:
        self._uri = target.uri
        self._root = Path(target.path)
        self._tree = Tree(self._uri, self._root)
        self._made_root = False

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_made_root": False}

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(conditional_create=True, conditional_update=True)

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        with self._errors(name, writing=True):
            hidden = self._tree.hidden(Upload(name, uuid.uuid4().hex))
            self._create(hidden)
            try:
                with files.opened(hidden, os.O_WRONLY) as fd:
                    files.write_fully(fd, 0, [memoryview(data)])
                    return self._publish(fd, hidden, name, condition)
            finally:
                self._remove(hidden)

    def get(self, name: str) -> tuple[bytes, ObjectInfo]:
        with self._errors(name), self._reading(name) as fd:
            info = _info(name, os.fstat(fd))
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
                    with files.locked(path.parent, needed=False):
                        path.unlink()
                except OSError as error:
                    if error.errno not in _NOT_THERE:
                        raise
                else:
                    folders[path.parent] = name
        for folder, name in folders.items():
            with self._errors(name):
                with contextlib.suppress(
                    FileNotFoundError
                ):  # removed with an object of it by another process
                    files.sync_folder(folder)
                self._remove_empty(folder)

    def begin_upload(self, name: str) -> Upload:
        upload = Upload(name, uuid.uuid4().hex)
        with self._errors(name, writing=True):
            self._create(self._tree.hidden(upload))
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
        del checksum  # there is nobody who would check it
        with self._errors(upload.name, writing=True), self._pending(upload) as fd:
            if self._is_published(upload.name, fd):
                raise self._ended(upload)
            size = 0
            for run in runs(buffers, _WINDOW):
                size += files.write_fully(fd, offset + size, run)
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
            self._remove(self._tree.hidden(upload))

    def pending_uploads(self, prefix: str = "") -> Iterator[PendingUpload]:
        with self._errors(None):
            for upload, entry in self._tree.uploads(prefix):
                with contextlib.suppress(FileNotFoundError):  # ended in the meantime
                    yield PendingUpload(upload, _time(entry.stat(follow_symlinks=False)))

    def copy_from(self, source: ObjectStore, info: ObjectInfo) -> ObjectInfo | None:
        """By the kernel: within one file system that shares blocks, no byte is moved."""
        if not isinstance(source, LocalStore):
            return None
        name = info.name
        with source._errors(name), source._reading(name) as original, self._errors(name, writing=True):  # noqa: SLF001 - of this class
            hidden = self._tree.hidden(Upload(name, uuid.uuid4().hex))
            self._create(hidden)
            try:
                with files.opened(hidden, os.O_WRONLY) as fd:
                    copied = files.copy_whole(original, fd, info.size)
                    if not copied or _info(name, os.fstat(original)).version != info.version:
                        return None
                    return self._publish(fd, hidden, name, Overwrite())
            finally:
                self._remove(hidden)

    def _create(self, hidden: Path) -> None:
        """Make an empty hidden file, and the folders above it where they are missing."""
        for attempt in range(_OPEN_TRIES):
            try:
                self._made_root |= not self._root.is_dir()
                files.make_folders(hidden.parent)
                with files.opened(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW):
                    return
            except FileNotFoundError:  # another process removed the folder, which was empty until now
                if attempt == _OPEN_TRIES - 1:
                    raise

    def _publish(self, fd: int, hidden: Path, name: str, condition: Condition) -> ObjectInfo:
        """Make the bytes of a hidden file durable, then visible on the condition, then that durable."""
        path = self._tree.path(name)
        # The kernel's own stamps are coarse: two writes in a tick on a reused inode would share a version.
        os.utime(fd, ns=(time.time_ns(), time.time_ns()))
        os.fsync(fd)
        # The lock is for updates: they compare and replace in one step only if nothing else is put meanwhile.
        with files.locked(path.parent, needed=isinstance(condition, Update)):
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
        files.sync_folders(path.parent, self._root)
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
            fd = os.open(self._tree.hidden(upload), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
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
        with files.opened(self._tree.path(name), os.O_RDONLY | os.O_NONBLOCK) as fd:
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
            got = files.read_fully(fd, at, run)
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
        """Leave no empty folders, and the root only where it was there before this store."""
        files.remove_empty_folders(folder, below=self._root.parent if self._made_root else self._root)

    @contextlib.contextmanager
    def _errors(self, name: str | None, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except OSError as error:
            kind, hint = StorageError, _HINTS.get(error.errno or 0)
            if error.errno in _NOT_THERE and not writing:
                kind, hint = ObjectNotFoundError, None
            elif error.errno in _DENIED:
                kind = AccessDeniedError
            reason = error.strerror or str(error)
            what = f"{reason}: {error.filename}" if error.filename else reason
            raise kind(what, uri=self._uri, object_name=name, hint=hint) from error


def _etag(offset: int, size: int) -> str:
    return f"{offset}+{size}"


def _time(status: os.stat_result) -> datetime:
    return datetime.fromtimestamp(status.st_mtime, UTC)


def _info(name: str, status: os.stat_result) -> ObjectInfo:
    version = f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
    return ObjectInfo(name, status.st_size, version, _time(status))
