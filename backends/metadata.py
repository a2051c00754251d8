"""``.metadata``: the only truth about a checkpoint, written with extras and read without running anything.

The file is DCP's own: a pickled ``Metadata``. Two extras ride along that stock readers ignore, both in the
``__dict__`` of objects that DCP pickles anyway: where an item's raw payload lies, on its ``_StorageInfo``,
and a plain dict named ``cloudckpt`` on the ``Metadata`` with the save's id, the library's version and the
table of objects.
"""

from __future__ import annotations

import collections
import io
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.distributed._shard.sharded_tensor import metadata as sharded_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import _get_layout

from cloudckpt.backends.errors import IntegrityError, UnsafeCheckpointError
from cloudckpt.backends.framing import Payload
from cloudckpt.backends.pickles import claims_too_much
from cloudckpt.backends.store import ObjectInfo

METADATA_NAME = ".metadata"
DATA_SUFFIX = ".distcp"
_EXTRAS = "cloudckpt"
_METADATA = re.compile(r"(__\d+)?\.metadata")
_LARGEST = (1 << 63) - 1
"""Bytes that an offset can count."""


def metadata_name(rank: int | None = None) -> str:
    """The name of the global metadata object, or of one rank's own (DCP's ``use_collectives=False``)."""
    return METADATA_NAME if rank is None else f"__{rank}{METADATA_NAME}"


def is_metadata(name: str) -> bool:
    """Whether an object of this name is a checkpoint's metadata, of all ranks or of one."""
    return _METADATA.fullmatch(name) is not None


def storage_info(name: str, offset: int, length: int, payload: Payload | None) -> _StorageInfo:
    """Where an item lies, offset and length in bytes, and where in it a raw payload lies."""
    info = _StorageInfo(name, offset, length)
    if payload is not None:
        info.__dict__.update(payload_offset=payload.offset, dtype=payload.dtype)
        if payload.stride is not None:
            info.__dict__["stride"] = payload.stride
    return info


def payload_of(info: _StorageInfo) -> Payload | None:
    """What our own writer noted of an item; None for values, and for what a stock writer wrote."""
    noted = info.__dict__
    if "payload_offset" not in noted:
        return None
    return Payload(noted["payload_offset"], noted["dtype"], noted.get("stride"))


def add_extras(metadata: Metadata, save_id: str, version: str, objects: Mapping[str, ObjectInfo]) -> None:
    """Attach what DCP has no field for."""
    metadata.__dict__[_EXTRAS] = {
        "version": version,
        "save_id": save_id,
        "objects": {name: {"size": info.size, "version": info.version} for name, info in objects.items()},
    }


def save_id_of(metadata: Metadata) -> str | None:
    """The id of the save that wrote this, None where a stock writer did."""
    extras = metadata.__dict__.get(_EXTRAS)
    save_id = extras.get("save_id") if isinstance(extras, dict) else None
    return save_id if isinstance(save_id, str) else None


def objects_of(metadata: Metadata) -> frozenset[str]:
    """The names of the data objects that a checkpoint consists of."""
    return frozenset(info.relative_path for info in metadata.storage_data.values())


def least_sizes(metadata: Metadata) -> dict[str, int]:
    """Bytes that each object must have at least, to hold the items that lie in it."""
    sizes: dict[str, int] = {}
    for info in metadata.storage_data.values():
        sizes[info.relative_path] = max(sizes.get(info.relative_path, 0), info.offset + info.length)
    return sizes


def dump(metadata: Metadata) -> bytes:
    """Serialise as stock DCP does."""
    return pickle.dumps(metadata)


def load(data: bytes, *, uri: str, name: str = METADATA_NAME, trust: bool = False) -> Metadata:
    """Read a ``Metadata``, and with ``trust=False`` run nothing that it says.

    Raises:
        UnsafeCheckpointError: it asks for something other than DCP's metadata classes.
        IntegrityError: it is not a whole and consistent ``Metadata``.
    """
    try:
        # With trust, the caller takes whoever wrote the checkpoint at their word.
        metadata = pickle.loads(data) if trust else _MetadataUnpickler(data, uri, name).settled()  # noqa: S301
        sound = _is_sound(metadata)
    except UnsafeCheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise IntegrityError(
            f"the checkpoint's metadata cannot be read: {type(error).__name__}: {error}",
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


class _MetadataUnpickler(pickle.Unpickler):
    """Knows DCP's metadata classes and nothing else.

    A pickle can set attributes on whatever ``find_class`` returns, classes included. So it is given stand-
    ins made for this one read: subclasses whose instances are turned into the real thing afterwards, and
    plain functions.
    """

    def __init__(self, data: bytes, uri: str, name: str) -> None:
        if claims_too_much(data):
            raise pickle.UnpicklingError("it claims more memory than it can need")
        super().__init__(io.BytesIO(data))
        self._uri, self._name = uri, name
        self._stand_ins: dict[type, type] = {}
        self._made: list[tuple[object, type]] = []

    def find_class(self, module: str, name: str) -> Any:
        if (real := _CLASSES.get((module, name))) is not None:
            return self._stand_in(real)
        if (function := _FUNCTIONS.get((module, name))) is not None:
            return lambda *args: function(*args)  # noqa: PLW0108 - a pickle may set attributes on it
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        raise UnsafeCheckpointError(
            f"the checkpoint's metadata asks for {module}.{name}, which DCP's own metadata never needs",
            uri=self._uri,
            object_name=self._name,
            hint="Pass trust=True only if you trust whoever wrote the checkpoint: it may run their code",
        )

    def settled(self) -> object:
        """Load, and turn the instances of stand-ins into instances of the real classes."""
        loaded: object = self.load()
        for instance, real in self._made:
            object.__setattr__(instance, "__class__", real)
        return loaded

    def _stand_in(self, real: type) -> type:
        if real not in self._stand_ins:

            def new(cls: type) -> object:
                instance: object = object.__new__(cls)
                self._made.append((instance, real))
                return instance

            self._stand_ins[real] = type(real.__name__, (real,), {"__new__": new})
        return self._stand_ins[real]


def _path_text(*parts: str) -> str:
    return "/".join(part.strip("/") or "" for part in parts)


_CLASSES: dict[tuple[str, str], type] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
        _StorageInfo,
        _StoragePrefix,
    )
} | {
    (
        "torch.distributed._shard.sharded_tensor.metadata",
        "TensorProperties",
    ): sharded_metadata.TensorProperties
}

_FUNCTIONS: dict[tuple[str, str], Callable[..., object]] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("pathlib", "PosixPath"): _path_text,
    ("pathlib", "WindowsPath"): _path_text,
    ("pathlib._local", "PosixPath"): _path_text,  # where Python 3.13 says that it lives
    ("pathlib._local", "WindowsPath"): _path_text,
    (_MEM_FORMAT_ENCODING.__module__, "_MEM_FORMAT_ENCODING"): _MEM_FORMAT_ENCODING,
    (sharded_metadata.__name__, "MEM_FORMAT_ENCODING"): sharded_metadata.MEM_FORMAT_ENCODING,
}


def _is_sound(metadata: object) -> bool:
    return (
        isinstance(metadata, Metadata)
        and isinstance(metadata.state_dict_metadata, dict)
        and all(_is_entry(fqn, entry) for fqn, entry in metadata.state_dict_metadata.items())
        and isinstance(metadata.storage_data, dict)
        and all(_is_place(index, info) for index, info in metadata.storage_data.items())
    )


def _is_entry(fqn: object, entry: object) -> bool:
    if not isinstance(fqn, str):
        return False
    if not isinstance(entry, TensorStorageMetadata):
        return isinstance(entry, BytesStorageMetadata)
    return (
        isinstance(entry.properties.dtype, torch.dtype)
        and isinstance(entry.size, torch.Size)
        and isinstance(entry.chunks, list)
        and all(
            isinstance(chunk, ChunkStorageMetadata)
            and len(chunk.offsets) == len(chunk.sizes) == len(entry.size)
            and all(o >= 0 and s >= 0 for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            for chunk in entry.chunks
        )
    )


def _is_place(index: object, info: object) -> bool:
    if not (isinstance(index, MetadataIndex) and isinstance(info, _StorageInfo)):
        return False
    name, payload = info.relative_path, payload_of(info)
    return (
        isinstance(name, str)
        and not name.startswith("/")
        and ".." not in name.split("/")
        and isinstance(info.offset, int)
        and isinstance(info.length, int)
        and info.offset >= 0
        and info.length >= 0
        and info.offset + info.length <= _LARGEST
        and (payload is None or _is_payload(info.length, payload.offset, payload.dtype, payload.stride))
        and isinstance(info.transform_descriptors, list | tuple | None)
        and all(isinstance(descriptor, str) for descriptor in info.transform_descriptors or ())
    )


def _is_payload(length: int, offset: object, dtype: object, stride: object) -> bool:
    return (
        isinstance(offset, int)
        and isinstance(dtype, torch.dtype)
        and 0 <= offset <= length
        and (
            stride is None
            or (isinstance(stride, tuple) and all(isinstance(s, int) and 0 <= s <= _LARGEST for s in stride))
        )
    )
