"""``.metadata``: the only truth about a checkpoint, written with extras and read without running anything.

The file is DCP's own: a pickled ``Metadata``. Extras ride along that stock readers ignore. Two are in the
``__dict__`` of objects that DCP pickles anyway: where an item's raw payload lies and its checksums, on its
``StorageInfo``, and a plain dict named ``cloudckpt`` on the ``Metadata`` with the save's id, the library's
version and the table of objects. The third follows the pickle, where no unpickler looks: its checksum.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Container, Iterator, Mapping
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from cloudckpt.backends.checksums import ALGORITHMS, CRC64NVME, Algorithm, Checks, is_consistent
from cloudckpt.backends.errors import IntegrityError, UnsafeCheckpointError
from cloudckpt.backends.format import metadata_pickler
from cloudckpt.backends.format.metadata_unpickler import MetadataUnpickler, is_index, is_offset
from cloudckpt.backends.format.tensor_archive import Payload
from cloudckpt.backends.stores.base import ObjectInfo
from cloudckpt.backends.torch_private import StorageInfo
from cloudckpt.backends.transfer.gc_pause import no_collection

_T = TypeVar("_T")

METADATA_NAME = ".metadata"
DATA_PREFIX = "__"
DATA_SUFFIX = ".distcp"
_EXTRAS = "cloudckpt"
_SEAL = b"cloudckpt.crc64nvme:"
_DIGITS = 16
_SEALED = len(_SEAL) + _DIGITS
"""Bytes that follow the pickle."""
_METADATA = re.compile(r"(__\d+)?\.metadata")
_LARGEST = (1 << 63) - 1
"""Bytes that an offset can count."""
_LONGEST = 4096
"""Characters of an object's name. S3 and GCS take 1,024 bytes, and Linux 4,096 of a path."""
_ALGORITHM = 32
"""Characters of a checksum in which its algorithm's name is."""
_QUOTED = 500
"""Characters of an error that are repeated: one may name what is as long as the metadata."""
_CHUNK = 16
"""Bytes of a chunk at least, all of whose fields lie elsewhere."""


def metadata_name(rank: int | None = None) -> str:
    """Return the name of the global metadata object, or of one rank's (``use_collectives=False``)."""
    return METADATA_NAME if rank is None else f"__{rank}{METADATA_NAME}"


def is_metadata(name: str) -> bool:
    """Return True for the name of a checkpoint's metadata, of all ranks or of one."""
    return _METADATA.fullmatch(name) is not None


def storage_info(name: str, offset: int, length: int, payload: Payload | None) -> StorageInfo:
    """Describe the place of an item, in bytes: offset, length, and the raw payload in it."""
    info = StorageInfo(name, offset, length)
    if payload is not None:
        info.__dict__.update(payload_offset=payload.offset, dtype=payload.dtype)
        if payload.stride is not None:
            info.__dict__["stride"] = payload.stride
    return info


def payload_of(info: StorageInfo) -> Payload | None:
    """Return our own writer's record of an item; None for values, and for an item of a stock writer."""
    noted = info.__dict__
    if "payload_offset" not in noted:
        return None
    return Payload(noted["payload_offset"], noted["dtype"], noted.get("stride"))


def add_checks(info: StorageInfo, checks: Checks) -> None:
    """Attach an item's checksums; their algorithm is that of its object."""
    info.__dict__.update(spans=checks.spans, sums=checks.sums)


def algorithms_of(metadata: Metadata) -> dict[str, Algorithm]:
    """Return the algorithm of each object's checksums, where it is known here."""
    found: dict[str, Algorithm] = {}
    for name, checksum in _noted(metadata, "checksum", str).items():
        if (algorithm := ALGORITHMS.get(checksum[:_ALGORITHM].partition(":")[0])) is not None:
            found[name] = algorithm
    return found


def checks_of(info: StorageInfo, algorithms: Mapping[str, Algorithm]) -> Checks | None:
    """Return an item's checksums by its object's algorithm; None for what a stock writer wrote."""
    noted = info.__dict__
    algorithm = algorithms.get(info.relative_path)
    if algorithm is None or "sums" not in noted:
        return None
    return Checks(algorithm, noted["spans"], noted["sums"])


def add_extras(
    metadata: Metadata,
    save_id: str,
    version: str,
    objects: Mapping[str, ObjectInfo],
    notes: Mapping[str, float] | None = None,
) -> None:
    """Attach what DCP has no field for; ``notes`` are the caller's own."""
    metadata.__dict__[_EXTRAS] = {
        **_extras(metadata),  # what the planner recorded
        "version": version,
        "save_id": save_id,
        "checksum": CRC64NVME.name,  # of the metadata itself, behind the pickle: see ``dump``
        "notes": dict(notes or {}),
        "objects": {
            name: {"size": info.size, "version": info.version, "checksum": info.checksum}
            for name, info in objects.items()
        },
    }


def _extras(metadata: Metadata) -> dict[str, Any]:
    extras = metadata.__dict__.get(_EXTRAS)
    return cast("dict[str, Any]", extras) if isinstance(extras, dict) else {}


def _noted(metadata: Metadata, what: str, kind: type[_T]) -> dict[str, _T]:
    """Return one field of our own writer's records of objects, by name."""
    objects = _extras(metadata).get("objects")
    if not isinstance(objects, dict):
        return {}
    return {
        name: value
        for name, held in objects.items()
        if isinstance(name, str) and isinstance(held, dict) and isinstance(value := held.get(what), kind)
    }


def save_id_of(metadata: Metadata) -> str | None:
    """Return the id of the save that wrote this, None where a stock writer did."""
    save_id = _extras(metadata).get("save_id")
    return save_id if isinstance(save_id, str) else None


def notes_of(metadata: Metadata) -> dict[str, float]:
    """Return the numbers that were saved with the checkpoint, by name."""
    notes = _extras(metadata).get("notes")
    if not isinstance(notes, dict):
        return {}
    return {
        name: float(value) for name, value in notes.items() if isinstance(name, str) and _is_number(value)
    }


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= _LARGEST)


def version_of(metadata: Metadata) -> str | None:
    """Return the version of this library that wrote this, None where a stock writer did."""
    version = _extras(metadata).get("version")
    return version if isinstance(version, str) else None


def objects_of(metadata: Metadata) -> frozenset[str]:
    """Return the names of the data objects that a checkpoint consists of."""
    return frozenset(info.relative_path for info in metadata.storage_data.values())


def least_sizes(metadata: Metadata) -> dict[str, int]:
    """Bytes that each object must have at least, to hold the items that lie in it."""
    sizes: dict[str, int] = {}
    for info in metadata.storage_data.values():
        sizes[info.relative_path] = max(sizes.get(info.relative_path, 0), info.offset + info.length)
    return sizes


def missing_item(metadata: Metadata, items: Container[MetadataIndex]) -> MetadataIndex | None:
    """Return an item that the plan has and ``items`` lacks; None where all are there."""
    return next((index for index in planned(metadata) if index not in items), None)


def planned(metadata: Metadata) -> Iterator[MetadataIndex]:
    """Every item that the plan has."""
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            for chunk in entry.chunks:
                yield MetadataIndex(fqn, chunk.offsets)
        else:
            yield MetadataIndex(fqn)


def sizes_of(metadata: Metadata) -> dict[str, int]:
    """Bytes of each object as its writer sent them, where the metadata tells."""
    return _noted(metadata, "size", int)


def dump(metadata: Metadata) -> bytes:
    """Serialise as stock DCP does, and add a checksum of that."""
    with no_collection():
        data = metadata_pickler.dumps(metadata)
    return b"".join((data, _SEAL, f"{CRC64NVME.of(data):016x}".encode()))  # copied once


def _is_damaged(data: bytes) -> bool:
    """Return True if the bytes differ from those of ``dump``; False where there is no checksum."""
    sealed = memoryview(data)[:-_SEALED]  # which may be many MiB, not to be copied
    return _is_sealed(data) and data[-_DIGITS:] != f"{CRC64NVME.of(sealed):016x}".encode()


def _has_lost_its_seal(data: bytes, metadata: object) -> bool:
    written_here = isinstance(metadata, Metadata) and "checksum" in _extras(metadata)
    return written_here and not _is_sealed(data)


def _is_sealed(data: bytes) -> bool:
    return data[-_SEALED:-_DIGITS] == _SEAL


def load(data: bytes, *, uri: str, name: str = METADATA_NAME, trust: bool = False) -> Metadata:
    """Read a ``Metadata``, and with ``trust=False`` run nothing that it says.

    Raises:
        UnsafeCheckpointError: it asks for something other than DCP's metadata classes.
        IntegrityError: it is not a whole and consistent ``Metadata``.
    """
    if _is_damaged(data):
        raise _damaged("the checkpoint's metadata is damaged: it does not match its checksum", uri, name)
    try:
        with no_collection():
            # With trust, the caller trusts the writer of the checkpoint.
            metadata = pickle.loads(data) if trust else MetadataUnpickler(data, uri, name).settled()  # noqa: S301
        if _has_lost_its_seal(data, metadata):
            raise _damaged("the checkpoint's metadata is damaged: its checksum is gone", uri, name)
        sound = _Sound(len(data) + _LONGEST).metadata(metadata)
    except (UnsafeCheckpointError, IntegrityError):
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise IntegrityError(
            f"the checkpoint's metadata cannot be read: {type(error).__name__}: {str(error)[:_QUOTED]}",
            uri=uri,
            object_name=name,
            hint="It is damaged or not a DCP checkpoint; load another step",
        ) from error
    if not sound:
        raise IntegrityError(
            "the checkpoint's metadata is not consistent",
            uri=uri,
            object_name=name,
            hint="It is damaged or was tampered with; load another step",
        )
    return cast(Metadata, metadata)


def _damaged(message: str, uri: str, name: str) -> IntegrityError:
    return IntegrityError(message, uri=uri, object_name=name, hint="Load another step")


class _Sound:
    """A look at metadata that was read: whether all in it is of the right kind and size.

    Args:
        left: bytes of lists and tuples that may be looked at, one an element: a million items may have one
            long list in common.
    """

    def __init__(self, left: int) -> None:
        self._left = left
        self._names: set[str] = set()
        """Names of objects that are sound."""

    def metadata(self, metadata: object) -> bool:
        """Return True if this is sound metadata."""
        if not isinstance(metadata, Metadata):
            return False
        algorithms = algorithms_of(metadata)
        return (
            isinstance(metadata.state_dict_metadata, dict)
            and all(self._entry(fqn, entry) for fqn, entry in metadata.state_dict_metadata.items())
            and isinstance(metadata.storage_data, dict)
            and all(
                self._place(index, info) and self._checks(info, algorithms)
                for index, info in metadata.storage_data.items()
            )
        )

    def _affords(self, elements: list[Any] | tuple[Any, ...], size: int = 1) -> bool:
        """Return True if so many elements of a size may still be looked at."""
        self._left -= len(elements) * size
        return self._left >= 0

    def _checks(self, info: StorageInfo, algorithms: Mapping[str, Algorithm]) -> bool:
        checks = checks_of(info, algorithms)
        return checks is None or (
            isinstance(checks.spans, tuple)
            and self._affords(checks.spans)
            and all(isinstance(span, int) for span in checks.spans)
            and isinstance(checks.sums, bytes)
            and is_consistent(checks, info.length)
        )

    def _entry(self, fqn: object, entry: object) -> bool:
        if not isinstance(fqn, str):
            return False
        if not isinstance(entry, TensorStorageMetadata):
            return isinstance(entry, BytesStorageMetadata)
        return (
            isinstance(entry.properties.dtype, torch.dtype)
            and is_offset(entry.size)
            and isinstance(entry.chunks, list)
            and self._affords(entry.chunks, _CHUNK)
            and all(
                isinstance(chunk, ChunkStorageMetadata)
                and isinstance(chunk.offsets, torch.Size)
                and isinstance(chunk.sizes, torch.Size)
                and len(chunk.offsets) == len(chunk.sizes) == len(entry.size)
                and min(chunk.offsets, default=0) >= 0
                and min(chunk.sizes, default=0) >= 0
                for chunk in entry.chunks
            )
        )

    def _place(self, index: object, info: object) -> bool:
        if not (isinstance(index, MetadataIndex) and is_index(index) and isinstance(info, StorageInfo)):
            return False
        offset, length, noted = info.offset, info.length, info.__dict__
        return (
            self._name(info.relative_path)
            and isinstance(offset, int)
            and isinstance(length, int)
            and offset >= 0
            and length >= 0
            and offset + length <= _LARGEST
            and ("payload_offset" not in noted or self._payload(length, noted))
            and ((transforms := info.transform_descriptors) is None or self._transforms(transforms))
        )

    def _name(self, name: object) -> bool:
        if not isinstance(name, str) or len(name) > _LONGEST:
            return False
        if name not in self._names and _is_name(name):
            self._names.add(name)
        return name in self._names

    def _payload(self, length: int, noted: Mapping[str, object]) -> bool:
        offset, stride = noted["payload_offset"], noted.get("stride")
        return (
            isinstance(offset, int)
            and isinstance(noted.get("dtype"), torch.dtype)
            and 0 <= offset <= length
            and (
                stride is None
                or (
                    isinstance(stride, tuple)
                    and self._affords(stride)
                    and all(isinstance(s, int) and 0 <= s <= _LARGEST for s in stride)
                )
            )
        )

    def _transforms(self, transforms: object) -> bool:
        return (
            isinstance(transforms, list | tuple)
            and self._affords(transforms)
            and all(isinstance(one, str) for one in transforms)
        )


def _is_name(name: str) -> bool:
    """Return True for a name below the checkpoint that a store can have."""
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:  # a lone surrogate
            return False
    return not name.startswith("/") and ".." not in name.split("/") and "\0" not in name
