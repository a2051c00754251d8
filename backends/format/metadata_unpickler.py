"""Unpickling a DCP ``Metadata`` of an untrusted writer, without running its code."""

from __future__ import annotations

import collections
import enum
import io
import pickle
from collections.abc import Callable, Sized
from typing import Any, Final, cast

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
from cloudckpt.backends.format.pickle_limits import claims_too_much
from cloudckpt.backends.torch_private import (
    StorageInfo,
    StoragePrefix,
    get_layout,
    memory_formats,
    sharded_properties,
)


class MetadataUnpickler(pickle.Unpickler):
    """Knows DCP's metadata classes and nothing else.

    A pickle can set attributes on anything that ``find_class`` returns, classes included. So it is given
    stand- ins made for this one read: subclasses whose instances are turned into the real thing afterwards,
    and plain functions.
    """

    def __init__(self, data: bytes, uri: str, name: str) -> None:
        if claims_too_much(data, strictly=True):
            raise pickle.UnpicklingError("it claims more memory than it can need")
        super().__init__(io.BytesIO(data))
        self._uri, self._name = uri, name
        self._stand_ins: dict[type, type] = {}
        self._made: list[tuple[type, list[object]]] = []
        """Instances of stand-ins, by the class that they stand in for."""
        self._left = _COPIED * len(data) + _LITTLE
        """Elements and characters that functions may still be given."""
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
            f"the checkpoint's metadata asks for {what[:_QUOTED]}, which DCP's own metadata never needs",
            uri=self._uri,
            object_name=self._name,
            hint="Pass trust=True only if you trust the writer of the checkpoint: it may run their code",
        )

    def _called(self, function: Callable[..., object]) -> Callable[..., object]:
        """Return something that calls the function: a pickle may set attributes on it."""

        def call(*args: object) -> object:
            # Thousands of calls may be given one long list, and each copies it.
            self._left -= len(args) + sum(len(cast("Sized", one)) for one in args if type(one) in _SIZED)
            if self._left < 0:
                raise pickle.UnpicklingError("it copies more than it has")
            return function(*args)

        if isinstance(function, type) and issubclass(function, enum.Enum):
            self._enumerations[id(call)] = call, function
        return call

    def _member(self, of: object, name: object) -> object:
        """Return a member of an enumeration of DCP's: early Pythons 3.11 pickle members by ``getattr``."""
        _, real = self._enumerations.get(id(of), (None, None))
        if real is not None and isinstance(name, str) and name in real.__members__:
            return real[name]
        raise self._unsafe("builtins.getattr of something else than an enumeration's member")

    def settled(self) -> object:
        """Load, and turn the instances of stand-ins into instances of the real classes."""
        try:
            loaded: object = self.load()
            settle = object.__setattr__
            for real, instances in self._made:
                for instance in instances:
                    settle(instance, "__class__", real)
            return loaded
        finally:
            for _, instances in self._made:  # a stand-in, which refers to them, lives until it is collected
                instances.clear()

    def _stand_in(self, real: type) -> type:
        if real not in self._stand_ins:
            instances: list[object] = []
            self._made.append((real, instances))
            made, note = object.__new__, instances.append

            def new(cls: type) -> object:
                instance: object = made(cls)
                note(instance)
                return instance

            own: dict[str, object] = {"__new__": new}
            if real is MetadataIndex:
                own["__hash__"] = _hash_of_index
                own["__eq__"] = _compared(instances)
            self._stand_ins[real] = type(real.__name__, (real,), own)
        return self._stand_ins[real]


def _compared(instances: list[object]) -> Callable[[object, object], bool]:
    """Return a comparison of indices, of which there may be a few for each of the instances.

    An attacker who chooses the offsets of a million items can give all of them the same hash, and each would
    be compared with all before it.
    """
    compared = 0

    def equal(one: MetadataIndex, other: MetadataIndex) -> bool:
        nonlocal compared
        compared += 1
        if compared > _COMPARED * len(instances):
            raise pickle.UnpicklingError("its items have too many hashes in common")
        return (one.fqn, one.offset) == (other.fqn, other.offset)

    return cast("Callable[[object, object], bool]", equal)


_COPIED: Final = 4
"""Elements that functions may be given, for each byte."""
_LITTLE: Final = 10_000
_QUOTED: Final = 200
"""Characters of a name that an error repeats."""
_SIZED: Final = frozenset({tuple, list, dict, str, bytes, bytearray, set, frozenset, torch.Size})
_DIMENSIONS: Final = 64
"""Most of an offset: it is hashed whenever its index is met. torch has tensors of no more."""
_CHARACTERS: Final = 1 << 16
"""Most of the name of an item: two names of one hash are compared, time and again."""
_COMPARED: Final = 100
"""Comparisons for each index: items have different hashes, and those that are there twice one in common."""


def _hash_of_index(index: MetadataIndex) -> int:
    """Hash an index that holds what an index holds; what else a pickle put there may take for ever."""
    if not is_index(index):
        raise TypeError("a MetadataIndex does not hold what it should")
    return hash((index.fqn, index.offset))


def is_index(index: MetadataIndex) -> bool:
    """Return True if an index has fields of the right types."""
    return (
        isinstance(index.fqn, str)
        and len(index.fqn) <= _CHARACTERS
        and (index.offset is None or is_offset(index.offset))
        and (index.index is None or isinstance(index.index, int))
    )


def is_offset(offset: object) -> bool:
    """Return True if this is a size of no more dimensions than there are."""
    return isinstance(offset, torch.Size) and len(offset) <= _DIMENSIONS


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
