"""Objects' names as paths below a folder, and the hidden files of uploads beside them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.stores.base import Upload
from cloudckpt.backends.stores.object_names import check_name

_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<upload_id>[0-9a-f]{32})\.partial", re.DOTALL)
_UPLOAD_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Tree:
    """The folder of a ``file://`` URI. Names never lead out of it, by ``..`` or by symbolic links."""

    uri: str
    root: Path

    def path(self, name: str) -> Path:
        """Return where an object is or would be.

        Raises:
            ConfigurationError: the name is not a relative path, is kept for uploads, or leads out of here.
        """
        check_name(name, self.uri)
        path = self.root / name
        if _HIDDEN.fullmatch(path.name):
            raise ConfigurationError(
                "names like .<name>.<id>.partial are kept for uploads", uri=self.uri, object_name=name
            )
        if not self._holds(path):
            raise ConfigurationError(
                "a symbolic link leads out of the checkpoint's folder",
                uri=self.uri,
                object_name=name,
                hint="Use the folder that it leads to as the URI",
            )
        return path

    def hidden(self, upload: Upload) -> Path:
        """Return the hidden file that holds an upload."""
        path = self.path(upload.name)
        if not _UPLOAD_ID.fullmatch(upload.upload_id):
            raise ConfigurationError(
                f"{upload.upload_id!r} is not an upload of this store", uri=self.uri, object_name=upload.name
            )
        return path.with_name(f".{path.name}.{upload.upload_id}.partial")

    def objects(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Yield the visible files whose names start with ``prefix``."""
        for name, entry in self._walk(prefix):
            if _is_object(entry):
                yield name, entry

    def children(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str] | None]]:
        """Yield visible files up to the next ``/`` of their names, and in place of the others their folders.

        A folder comes without an entry, with a ``/`` at its end, and only if a visible file lies below it.
        """
        for name, entry in self._entries(prefix):
            if _is_object(entry):
                yield name, entry
            elif entry.is_dir(follow_symlinks=False) and any(True for _ in self.objects(f"{name}/")):
                yield f"{name}/", None

    def uploads(self, prefix: str) -> Iterator[tuple[Upload, os.DirEntry[str]]]:
        """Yield the uploads of objects whose names start with ``prefix``."""
        folder, slash, _ = prefix.rpartition("/")
        for name, entry in self._walk(folder + slash):
            if (hidden := _HIDDEN.fullmatch(entry.name)) is None:
                continue
            upload = Upload(f"{name.removesuffix(entry.name)}{hidden['name']}", hidden["upload_id"])
            if upload.name.startswith(prefix):
                yield upload, entry

    def empty_folders(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Yield the folders below the root in which nothing is, not even a hidden file."""
        yield from self._empty_folders("")

    def _empty_folders(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        for name, entry in self._entries(prefix):
            if not entry.is_dir(follow_symlinks=False):
                continue
            with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                with os.scandir(entry.path) as entries:
                    is_empty = next(entries, None) is None
                if is_empty:
                    yield name, entry
                else:
                    yield from self._empty_folders(f"{name}/")

    def _walk(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        for name, entry in self._entries(prefix):
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(f"{name}/")
            else:
                yield name, entry

    def _entries(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Yield what is in one folder and has a name, from the root, that starts with ``prefix``."""
        above, slash, start = prefix.rpartition("/")
        folder = self.root / above if above else self.root
        if slash and (any(part in ("", ".", "..") for part in above.split("/")) or not self._holds(folder)):
            return  # no object has such a name
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if entry.name.startswith(start):
                yield f"{above}{slash}{entry.name}", entry

    def _holds(self, path: Path) -> bool:
        # Not Path.resolve, which raises on a loop of links; opening one says so itself.
        root = os.path.realpath(self.root).rstrip("/")
        return os.path.realpath(path).startswith(f"{root}/")


def _is_object(entry: os.DirEntry[str]) -> bool:
    try:
        return not _HIDDEN.fullmatch(entry.name) and entry.is_file()
    except OSError:  # a link that leads nowhere, or to itself
        return False
