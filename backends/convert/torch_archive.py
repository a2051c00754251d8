"""The archive that ``torch.save`` writes, where it lies: its records, each at a known offset.

It is a zip file that compresses nothing. Its directory is read by ranges, like the few small records that
describe the state; of the tensors' records only where they begin.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Final, cast

from cloudckpt.backends.errors import CheckpointError, ConfigurationError, IntegrityError
from cloudckpt.backends.format.stock_archive import Positioned
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.transfer.byte_ranges import Extent, nothing
from cloudckpt.backends.transfer.downloader import Downloader

_ZIPPED: Final = b"PK\x03\x04"
_LOCAL: Final = 30
"""Bytes of a record's own header, before its name."""
_BUFFER: Final = 1 << 20
_PICKLE: Final = "data.pkl"


@dataclass(frozen=True, slots=True)
class Record:
    """Some bytes of the file."""

    offset: int
    size: int


class Archive:
    """The records of a ``torch.save`` file.

    Args:
        store: where it is.
        name: its object's.
        size: its bytes.
        memory_limit: bytes that one record which is read whole may have.

    Raises:
        IntegrityError: it is damaged, or claims more than there is.
        ConfigurationError: it is no file of this kind.
    """

    def __init__(self, store: ObjectStore, name: str, size: int, memory_limit: int) -> None:
        self._store = store
        self._name = name
        self._size = size
        self._memory_limit = memory_limit
        begin = bytearray(min(size, len(_ZIPPED)))
        store.read_into(name, 0, [memoryview(begin)])
        if bytes(begin) != _ZIPPED:
            raise ConfigurationError(
                "this is not what torch.save has written since version 1.6",
                uri=store.uri,
                object_name=name,
                hint="Load it with torch.load where it is trusted, and save it again with torch.save",
            )
        self._file = io.BufferedReader(_Ranged(store, name, size), _BUFFER)
        try:
            self._zip = zipfile.ZipFile(cast(IO[bytes], self._file))
            self._infos = self._checked()
        except CheckpointError:
            raise
        except Exception as error:  # a damaged directory can raise nearly anything
            raise self.damaged(f"its archive can't be read: {error}") from error

    def __contains__(self, record: str) -> bool:
        return record in self._infos

    def read(self, record: str) -> bytes:
        """Return a small record, compared with its checksum.

        Raises:
            IntegrityError: it is missing or damaged.
            ConfigurationError: it is not small.
        """
        info = self._infos.get(record)
        if info is None:
            raise self.damaged(f"it has no record {record!r}")
        if info.file_size > self._memory_limit:
            raise ConfigurationError(
                f"its record {record!r} has {info.file_size:,} bytes, more than memory_limit allows",
                uri=self._store.uri,
                object_name=self._name,
                hint="Raise memory_limit",
            )
        try:
            return self._zip.read(info)
        except CheckpointError:
            raise
        except Exception as error:  # damaged bytes can raise nearly anything
            raise self.damaged(f"its record {record!r} can't be read: {error}") from error

    def located(self, records: Sequence[str], downloader: Downloader) -> dict[str, Record]:
        """Return the positions of these records' bytes.

        Raises:
            IntegrityError: one is missing, or ends after the file.
        """
        if missing := [record for record in records if record not in self._infos]:
            raise self.damaged(f"it has no record {missing[0]!r}")
        # How long the name and the padding before the bytes are is only said where the record is.
        headers = {record: bytearray(_LOCAL) for record in records}
        extents = [
            Extent(self._infos[record].header_offset, _LOCAL, nothing, into=memoryview(header))
            for record, header in headers.items()
        ]
        downloader.read({self._name: extents})
        found: dict[str, Record] = {}
        for record, header in headers.items():
            info = self._infos[record]
            lengths = [int.from_bytes(header[at : at + 2], "little") for at in (26, 28)]
            at = info.header_offset + _LOCAL + sum(lengths)
            if bytes(header[: len(_ZIPPED)]) != _ZIPPED or at + info.file_size > self._size:
                raise self.damaged(f"its record {record!r} is not where its directory says")
            found[record] = Record(at, info.file_size)
        return found

    def damaged(self, message: str) -> IntegrityError:
        """Return the error that says what is wrong with the file."""
        return IntegrityError(
            message, uri=self._store.uri, object_name=self._name, hint="It is damaged: get it anew"
        )

    def _checked(self) -> dict[str, zipfile.ZipInfo]:
        """Return the records by their names below the archive's own."""
        infos = self._zip.infolist()
        roots = [one.filename.removesuffix(_PICKLE) for one in infos if one.filename.endswith(f"/{_PICKLE}")]
        root = min(roots, key=len, default="")
        found = {one.filename.removeprefix(root): one for one in infos}
        if not roots or "constants.pkl" in found:
            raise ConfigurationError(
                "this archive is not what torch.save writes",
                uri=self._store.uri,
                object_name=self._name,
                hint="Of a model that torch.jit saved, save the state_dict() with torch.save",
            )
        if len(found) < len(infos):
            raise self.damaged("its archive has two records of one name")
        if any(one.compress_type != zipfile.ZIP_STORED or one.flag_bits & 1 for one in infos):
            raise self.damaged("its archive is compressed or encrypted, as torch.save's never is")
        if sum(one.file_size for one in infos) > self._size or any(
            one.header_offset < 0
            or one.header_offset + _LOCAL > self._size
            or one.file_size != one.compress_size
            for one in infos
        ):
            raise self.damaged("its archive claims to hold more than there is")
        return found


class _Ranged(Positioned):
    """An object as a file that is read by ranges."""

    def __init__(self, store: ObjectStore, name: str, size: int) -> None:
        super().__init__(size)
        self._store, self._name = store, name

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        before = self._position
        if super().seek(offset, whence) < 0:
            self._position = before
            raise ValueError("before the beginning")
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._position))
        if count:
            self._store.read_into(self._name, self._position, [memoryview(buffer)[:count]])
        self._position += count
        return count
