"""Unpickling a DCP ``Metadata`` from whoever wrote it, and running nothing."""

from __future__ import annotations

import collections
import enum
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from cloudckpt.backends.errors import UnsafeCheckpointError
from cloudckpt.backends.pickles import claims_too_much
from cloudckpt.backends.torch_private import (
    StorageInfo,
    StoragePrefix,
    get_layout,
    memory_formats,
    sharded_properties,
)


class MetadataUnpickler(pickle.Unpickler):
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
        self._enumerations: dict[int, tuple[object, type[enum.Enum]]] = {}
        """What is called for one, and that, by the identity of the former."""

    def find_class(self, module: str, name: str) -> Any:
        if (real := _CLASSES.get((module, name))) is not None:
            return self._stand_in(real)
        if (function := _FUNCTIONS.get((module, name))) is not None:
            return self._called(function)
        if (module, name) == ("builtins", "getattr"):
            return self._called(self._member)
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        raise self._unsafe(f"{module}.{name}")

    def _unsafe(self, what: str) -> UnsafeCheckpointError:
        return UnsafeCheckpointError(
            f"the checkpoint's metadata asks for {what}, which DCP's own metadata never needs",
            uri=self._uri,
            object_name=self._name,
            hint="Pass trust=True only if you trust whoever wrote the checkpoint: it may run their code",
        )

    def _called(self, function: Callable[..., object]) -> Callable[..., object]:
        """Return something that calls the function: a pickle may set attributes on it."""

        def call(*args: object) -> object:
            return function(*args)

        if isinstance(function, type) and issubclass(function, enum.Enum):
            self._enumerations[id(call)] = call, function
        return call

    def _member(self, of: object, name: object) -> object:
        """What ``getattr`` finds in an enumeration of DCP's: early Pythons 3.11 pickle members so."""
        _, real = self._enumerations.get(id(of), (None, None))
        if real is not None and isinstance(name, str) and name in real.__members__:
            return real[name]
        raise self._unsafe("builtins.getattr of something else than an enumeration's member")

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

            own: dict[str, object] = {"__new__": new}
            if real is MetadataIndex:
                own["__hash__"] = _hash_of_index
            self._stand_ins[real] = type(real.__name__, (real,), own)
        return self._stand_ins[real]


def _hash_of_index(index: MetadataIndex) -> int:
    """Hash an index that holds what an index holds; what else a pickle put there may take for ever."""
    if not is_index(index):
        raise TypeError("a MetadataIndex does not hold what it should")
    return hash((index.fqn, index.offset))


def is_index(index: MetadataIndex) -> bool:
    """Whether an index holds what an index holds."""
    return (
        isinstance(index.fqn, str)
        and isinstance(index.offset, torch.Size | None)
        and isinstance(index.index, int | None)
    )


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
        StorageInfo,
        StoragePrefix,
    )
} | sharded_properties()

_FUNCTIONS: dict[tuple[str, str], Callable[..., object]] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): get_layout,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("pathlib", "PosixPath"): _path_text,
    ("pathlib", "WindowsPath"): _path_text,
    ("pathlib._local", "PosixPath"): _path_text,  # where Python 3.13 says that it lives
    ("pathlib._local", "WindowsPath"): _path_text,
    **memory_formats(),
}
