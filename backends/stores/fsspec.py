"""Objects on any file system that fsspec knows, by its common interface alone.

Nothing in that interface is conditional, so ``put`` supports :class:`Overwrite` alone. A multipart upload is
emulated: parts are objects of their own below a hidden folder, and completing copies them through memory into
the object, block by block.

An object becomes visible by ``commit`` of a file opened with ``autocommit=False``, never by the end of a
``with`` block, which would publish what a failure cut short. A file system that ignores ``autocommit`` shows
the object while it is written. There only the commit of ``.metadata``, which comes last, guards the readers.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import fsspec
from fsspec.spec import AbstractBufferedFile

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import (
    AccessDeniedError,
    CheckpointError,
    ConfigurationError,
    IntegrityError,
    ObjectNotFoundError,
    StorageError,
    UnansweredError,
)
from cloudckpt.backends.stores.base import (
    Arrived,
    Capabilities,
    Condition,
    Departed,
    Listing,
    ObjectInfo,
    ObjectStore,
    Overwrite,
    Part,
    PendingUpload,
    Upload,
)
from cloudckpt.backends.stores.buffer_batches import runs
from cloudckpt.backends.stores.size_limit import check_whole
from cloudckpt.backends.system.system_limits import open_files_cure

_UPLOADS = ".cloudckpt-uploads"
_NAME = "name"
_BLOCK = 8 << 20
_READS = 10


class FsspecStore(ObjectStore):
    """Objects below one folder of an fsspec file system."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._root = f"{target.bucket}/{target.path}".strip("/") if target.bucket else target.path.rstrip("/")
        self._lock = threading.Lock()
        self._made: tuple[int, Any] | None = None

    def __reduce__(self) -> tuple[type[FsspecStore], tuple[Target]]:
        return type(self), (self._target,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    @property
    def uri(self) -> str:
        return self._target.uri

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(conditional_create=False, conditional_update=False)

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        with self._explained(name):
            if not isinstance(condition, Overwrite):
                raise ConfigurationError(f"{self._target.protocol}:// has no conditional put")
            self._write(self._path(name), [data])
        return self.stat(name)

    def get(self, name: str) -> tuple[bytes, ObjectInfo]:
        before = self.stat(name)
        for _ in range(_READS):
            check_whole(self._target, name, before.size)
            data = b""
            if before.size:  # a server refuses a range of an empty object
                with self._explained(name):
                    # One byte more than there should be shows an object that is larger, however large it is.
                    data = self._fs.cat_file(self._path(name), start=0, end=before.size + 1)
            # Bytes and version come from separate requests: another writer may have been between them.
            after = self.stat(name)
            if after == before and len(data) == before.size:
                return data, before
            before = after
        message = f"the object changed during each of {_READS} reads"
        raise StorageError(message, uri=self.uri, object_name=name)

    def read_into(
        self,
        name: str,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        arrived: Arrived | None = None,
    ) -> int:
        size, wanted = self.stat(name).size, sum(buffer.nbytes for buffer in buffers)
        with self._explained(name):
            if wanted and offset + wanted > size:
                raise IntegrityError(f"the object ends at byte {size}, before byte {offset + wanted}")
            done = 0
            for run in runs(buffers, _BLOCK):
                end = offset + sum(piece.nbytes for piece in run)
                data = memoryview(self._fs.cat_file(self._path(name), start=offset, end=end))
                if data.nbytes != end - offset:
                    raise IntegrityError(f"the object ends at byte {offset + data.nbytes}, before byte {end}")
                for piece in run:
                    piece[:], data = data[: piece.nbytes], data[piece.nbytes :]
                done += end - offset
                offset = end
                if arrived is not None:
                    arrived(done)
        return size

    def stat(self, name: str) -> ObjectInfo:
        with self._explained(name):
            path = self._path(name)
            self._fs.invalidate_cache()
            found = self._fs.info(path)
            if found["type"] != "file":
                raise ObjectNotFoundError("no such object, but a folder of that name")
            return _info(name, found)

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        folder = prefix.rpartition("/")[0]
        objects: list[ObjectInfo] = []
        prefixes: list[str] = []
        for name, entry in self._entries(folder, deep=not delimiter):
            if not name.startswith(prefix) or name.partition("/")[0] == _UPLOADS:
                continue
            if entry["type"] == "directory":
                prefixes.append(f"{name}/")
            else:
                objects.append(_info(name, entry))
        return Listing(tuple(sorted(objects, key=lambda info: info.name)), tuple(sorted(prefixes)))

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with self._explained(name), contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self._fs.rm_file(self._path(name))

    def begin_upload(self, name: str) -> Upload:
        upload = Upload(name, uuid.uuid4().hex)
        with self._explained(name):
            self._write(self._part_path(upload, _NAME), [name.encode()])
        return upload

    @property
    def wants_several_objects(self) -> bool:
        return True

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
        del offset  # the order of the numbers is the order of the bytes
        with self._explained(upload.name):
            self._need(upload)
            self._write(self._part_path(upload, str(number)), buffers)
        return Part(number, sum(buffer.nbytes for buffer in buffers))

    def complete_upload(self, upload: Upload, parts: Sequence[Part], *, confirm: bool = True) -> ObjectInfo:
        del confirm  # it is done on the way
        ordered = sorted(parts, key=lambda part: part.number)
        with self._explained(upload.name):
            self._need(upload)
            for part in ordered:
                held = self._fs.info(self._part_path(upload, str(part.number)))["size"]
                if held != part.size:
                    raise IntegrityError(
                        f"part {part.number} has {held:,} bytes where {part.size:,} were sent"
                    )
            self._write(self._path(upload.name), self._blocks(upload, ordered))
        info = self.stat(upload.name)
        size = sum(part.size for part in ordered)
        if info.size != size:
            self.delete([upload.name])
            message = f"the completed object has {info.size:,} bytes where its parts have {size:,}"
            raise IntegrityError(message, uri=self.uri, object_name=upload.name)
        self.abort_upload(upload)
        return info

    def abort_upload(self, upload: Upload) -> None:
        with self._explained(upload.name), contextlib.suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            self._fs.rm(self._part_path(upload, ""), recursive=True)

    def pending_uploads(self, prefix: str = "") -> Iterator[PendingUpload]:
        for path, entry in self._entries(_UPLOADS, deep=True):
            _, upload_id, file = path.split("/")
            if file != _NAME:
                continue
            with self._explained(path):
                try:
                    name = self._fs.cat_file(self._path(path)).decode()
                except FileNotFoundError:
                    continue  # ended since it was listed
            if name.startswith(prefix):
                yield PendingUpload(Upload(name, upload_id), _modified(entry))

    @property
    def _fs(self) -> Any:
        """The file system of this process: one that was forked makes its own."""
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = os.getpid(), fsspec.filesystem(self._target.protocol, **_arguments(self._target))
            return self._made[1]

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _part_path(self, upload: Upload, part: str) -> str:
        return self._path(f"{_UPLOADS}/{upload.upload_id}/{part}").rstrip("/")

    def _need(self, upload: Upload) -> None:
        self._fs.invalidate_cache()
        if not self._fs.exists(self._part_path(upload, _NAME)):
            raise StorageError("the upload does not exist: it was completed or aborted")

    def _blocks(self, upload: Upload, parts: Sequence[Part]) -> Iterator[bytes]:
        for part in parts:
            path = self._part_path(upload, str(part.number))
            for start in range(0, part.size, _BLOCK):
                yield self._fs.cat_file(path, start=start, end=min(start + _BLOCK, part.size))

    def _write(self, path: str, blocks: Iterable[bytes | memoryview]) -> None:
        """Make the blocks visible as one file, all of them or none."""
        fs = self._fs
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        file = fs.open(path, "wb", autocommit=False)
        if not hasattr(file, "commit"):
            # Nothing was written, so that this leaves an empty file at worst.
            file.close()
            raise ConfigurationError(
                f"{self._target.protocol}:// can't hold a file back until it is whole",
                uri=self.uri,
                hint="Save to a store that fsspec can write with autocommit=False, such as s3:// or file://",
            )
        try:
            for block in blocks:
                file.write(block)
            file.close()
            file.commit()
        except BaseException:
            _discard(file)
            raise
        finally:
            # fsspec keeps such a file for the end of a transaction, which there is none of.
            with contextlib.suppress(ValueError):
                fs.transaction.files.remove(file)

    def _entries(self, folder: str, *, deep: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield names and fsspec's entries below a folder: all files, or its next level with folders."""
        base = self._path(folder).rstrip("/")
        with self._explained():
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(base, detail=True).values() if deep else self._fs.ls(base, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return
        for entry in found:
            # Some file systems put a slash before names, or after folders.
            path = entry["name"].strip("/")
            if path != base.strip("/"):
                yield path.removeprefix(self._root.strip("/")).lstrip("/"), entry

    @contextlib.contextmanager
    def _explained(self, name: str | None = None) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            raise error.located(uri=self.uri, object_name=name) from error.__cause__
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ObjectNotFoundError("no such object", uri=self.uri, object_name=name) from error
        except PermissionError as error:
            raise AccessDeniedError("access was denied", uri=self.uri, object_name=name) from error
        except (TimeoutError, ConnectionError) as error:
            message = f"{self._target.protocol}:// gave no answer: {type(error).__name__}"
            raise UnansweredError(message, uri=self.uri, object_name=name) from error
        except Exception as error:  # each file system has exceptions of its own, with no common root
            message = f"{self._target.protocol}:// failed: {type(error).__name__}"
            raise StorageError(
                message, uri=self.uri, object_name=name, hint=open_files_cure(error)
            ) from error


def _arguments(target: Target) -> dict[str, Any]:
    options = target.options
    given: dict[str, Any] = {
        **options.storage_options,
        "use_listings_cache": False,
        "skip_instance_cache": True,
    }
    if target.protocol != "gs":
        return given
    refused = [name for name in ("storage_class", "kms_key_name") if getattr(options, name) is not None]
    refused += ["checksum"] if options.checksum not in ("auto", "none") else []
    if refused:
        raise ConfigurationError(f"{', '.join(refused)} can't be honoured by gs:// yet", uri=target.uri)
    token = "anon" if options.anon else options.token and options.token.get_secret_value()
    named = {"endpoint_url": options.endpoint_url, "project": options.project, "token": token}
    return {**given, **{name: value for name, value in named.items() if value is not None}}


def _discard(file: Any) -> None:
    """Drop a file that was not committed, without the close that would publish it."""
    if isinstance(file, AbstractBufferedFile):
        file.closed = True  # else its finaliser closes it, and writes what it holds
    file.discard()


def _info(name: str, entry: dict[str, Any]) -> ObjectInfo:
    version = (
        entry.get("ETag")
        or entry.get("etag")
        or hashlib.sha256(repr(sorted(entry.items())).encode()).hexdigest()
    )
    return ObjectInfo(name, entry["size"], version, _modified(entry))


def _modified(entry: dict[str, Any]) -> datetime | None:
    """Return the time of the last change, under whichever of its names the file system has it."""
    found = next(
        filter(None, map(entry.get, ("LastModified", "mtime", "modified", "updated", "created"))), None
    )
    if isinstance(found, int | float):
        return datetime.fromtimestamp(found, UTC)
    if isinstance(found, str):
        found = datetime.fromisoformat(found)
    if not isinstance(found, datetime):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
