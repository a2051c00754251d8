"""Reading a ``torch.save`` file: its pickle alone, with placeholders for the memory of tensors.

The pickle is loaded by torch's own ``weights_only`` unpickler, or where its writer is trusted by Python's.
Either asks for storages by the names of their records, and is given ones on the meta device.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from cloudckpt.backends import strides, torch_private
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.convert.state_source import Path, Source, refuse_kind
from cloudckpt.backends.convert.torch_archive import Archive, Record
from cloudckpt.backends.errors import (
    CheckpointError,
    ConfigurationError,
    IntegrityError,
    UnsafeCheckpointError,
)
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.format.pickle_limits import claims_too_much
from cloudckpt.backends.format.tensor_archive import Payload
from cloudckpt.backends.state.values import plain_data_allowed
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.torch_private import StorageInfo, flatten_state_dict, weights_only
from cloudckpt.backends.transfer.downloader import Downloader

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_REPEATED = 1 << 30
"""Bytes that a tensor may have whose elements lie over one another, as ``expand`` makes them: a few bytes
could claim as many as they like."""


def open_file(store: ObjectStore, name: str, target: Target, memory_limit: int, *, trust: bool) -> Source:
    """Return a ``torch.save`` file as a source of tensors and values.

    Raises:
        ObjectNotFoundError: it is not there.
        ConfigurationError: it is of another kind, or holds something other than a state.
        IntegrityError: it is damaged, or claims more than it has.
        UnsafeCheckpointError: reading it would run code.
    """
    info = store.stat(name)
    downloader = Downloader(store, max(1, target.options.concurrency // 2), memory_limit, {name: info.size})
    archive = Archive(store, name, info.size, memory_limit)

    def check() -> None:
        if store.stat(name).version != info.version:
            raise archive.damaged("it was overwritten while it was read")

    try:
        read = _Reading(store, name, archive, downloader, trust=trust).run()
    except CheckpointError as error:
        error.located(uri=store.uri, object_name=name)
        raise
    return Source(
        store,
        read.metadata,
        downloader,
        paths=read.paths,
        held=read.held,
        shared=read.shared,
        check=check,
        trust=trust,
    )


@dataclass(frozen=True, slots=True)
class _Read:
    metadata: Metadata
    paths: Mapping[str, Path]
    held: Mapping[str, Any]
    shared: Sequence[tuple[str, ...]]


class _Reading:
    """One file, on its way to being a source."""

    def __init__(
        self, store: ObjectStore, name: str, archive: Archive, downloader: Downloader, *, trust: bool
    ) -> None:
        self._store = store
        self._name = name
        self._archive = archive
        self._downloader = downloader
        self._trust = trust
        self._pickle = archive.read("data.pkl")
        if "byteorder" in archive and archive.read("byteorder") != sys.byteorder.encode():
            raise ConfigurationError(
                "this file was written on a machine of the other byte order",
                hint="Load it with torch.load and save it again",
            )
        if not trust and claims_too_much(self._pickle):
            raise archive.damaged("its pickle claims more than it can need")

    def run(self) -> _Read:
        storages = _Storages({})
        flat, paths = _flattened(self._unpickled(storages))
        for key, leaf in flat.items():
            if isinstance(leaf, torch.Tensor):
                _check_kind(key, leaf)
        places = self._archive.located([f"data/{name}" for name in storages.sizes], self._downloader)
        for name, nbytes in storages.sizes.items():
            if nbytes > places[f"data/{name}"].size:
                raise self._archive.damaged(
                    f"its record {name!r} is shorter than the {nbytes:,} bytes needed"
                )
        # Tensors within values, such as those in a tuple, are read with them, and so is what must be negated.
        needed = {one for leaf in flat.values() if not _is_apart(leaf) for one in _storages_in(leaf)}
        if needed:
            if needed - storages.names.keys():
                raise self._archive.damaged("a tensor in it has no data")
            names = {storages.names[one] for one in needed}
            storages = _Storages({name: self._brought(places[f"data/{name}"]) for name in names})
            flat, paths = _flattened(self._unpickled(storages))
        return self._described(flat, cast("Mapping[str, Path]", paths), storages, places)

    def _unpickled(self, storages: _Storages) -> object:
        stream = io.BytesIO(self._pickle)
        try:
            if self._trust:
                trusting = _Trusting(stream)
                trusting.storages = storages
                return trusting.load()
            with plain_data_allowed():
                careful = weights_only.Unpickler(stream, encoding="utf-8")
                careful.persistent_load = storages.load
                return careful.load()
        except IntegrityError:
            raise
        except pickle.UnpicklingError as refused:
            first = str(refused).partition(". ")[0].strip()
            raise UnsafeCheckpointError(
                f"reading it could run code: {first}",
                hint="Allow its classes with torch.serialization.add_safe_globals, or say that you trust "
                "its writer",
            ) from refused
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise self._archive.damaged(
                f"its pickle can't be read: {type(error).__name__}: {error}"
            ) from error

    def _brought(self, place: Record) -> torch.UntypedStorage:
        data = self._downloader.fetch(self._name, place.offset, place.size)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage()

    def _described(
        self,
        flat: Mapping[str, Any],
        paths: Mapping[str, Path],
        storages: _Storages,
        places: Mapping[str, Record],
    ) -> _Read:
        metadata = Metadata({}, storage_data={})
        held: dict[str, Any] = {}
        spans: defaultdict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for key, leaf in flat.items():
            if not isinstance(leaf, torch.Tensor):
                metadata.state_dict_metadata[key] = BytesStorageMetadata()
                held[key] = leaf
                continue
            tensor = leaf.detach()
            nowhere = torch.Size([0] * tensor.dim())
            size = torch.Size(tensor.shape)
            metadata.state_dict_metadata[key] = TensorStorageMetadata(
                TensorProperties(tensor.dtype), size, [ChunkStorageMetadata(nowhere, size)]
            )
            name = storages.names.get(_address(tensor.untyped_storage()))
            if name is None:
                raise self._archive.damaged(f"{key!r} has no data")
            if not _is_apart(leaf):
                held[key] = tensor.resolve_conj().resolve_neg()
                continue
            info = self._place(key, tensor, storages.sizes[name], places[f"data/{name}"])
            metadata.storage_data[MetadataIndex(key, nowhere)] = info
            spans[name].append((info.offset, info.offset + info.length, key))
        shared = [group for of_storage in spans.values() for group in _overlapping(of_storage)]
        return _Read(metadata, paths, held, shared)

    def _place(self, key: str, tensor: torch.Tensor, nbytes: int, place: Record) -> StorageInfo:
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        first = int(tensor.storage_offset()) * tensor.itemsize
        length = strides.span(shape, stride) * tensor.itemsize
        if first + length > nbytes or tensor.numel() * tensor.itemsize > max(nbytes, _REPEATED):
            raise self._archive.damaged(f"{key!r} does not fit into the {nbytes:,} bytes of its storage")
        payload = Payload(0, tensor.dtype, None if stride == strides.row_major(shape) else stride)
        return md.storage_info(self._name, place.offset + first, length, payload)


class _Storages:
    """Hands out storages by the names of their records: with their data, or on the meta device."""

    def __init__(self, data: Mapping[str, torch.UntypedStorage]) -> None:
        self._data = data
        self.names: dict[int, str] = {}
        """By the address of what torch holds of them."""
        self.sizes: dict[str, int] = {}
        """Bytes."""
        self._made: dict[str, torch.UntypedStorage] = {}

    def load(self, described: Any) -> Any:
        """Return the placeholder that a pickle gets for a storage."""
        match described:
            case ("storage" | b"storage", kind, str(name), _, int(count)) if count >= 0:
                dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
            case _:
                raise IntegrityError("its pickle asks for something other than a storage")
        nbytes = count * dtype.itemsize
        if self.sizes.setdefault(name, nbytes) != nbytes:
            raise IntegrityError(f"its pickle claims two sizes of record {name!r}")
        if name not in self._made:
            held = self._data.get(name)
            storage = _without_memory(nbytes) if held is None else held
            self._made[name] = storage
            self.names[_address(storage)] = name
        made: Any = torch.storage.TypedStorage
        return made(wrap_storage=self._made[name], dtype=dtype, _internal=True)  # its own constructor warns


class _Trusting(pickle.Unpickler):
    """Python's own unpickler, as ``torch.load`` sets it up."""

    storages: _Storages

    def persistent_load(self, pid: Any) -> Any:
        return self.storages.load(pid)

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda") and name.endswith("Storage") and name != "UntypedStorage":
            kind: Any = torch.serialization.StorageType
            return kind(name)
        return super().find_class("torch._tensor" if module == "torch.tensor" else module, name)


def _flattened(state: object) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Keys and entries as DCP flattens a state, and where each is in it."""
    if not isinstance(state, Mapping):
        raise ConfigurationError(
            f"this file holds a {type(state).__name__}, and a state is a dict",
            hint="Save what belongs in a checkpoint as a dict, such as {'model': model.state_dict()}",
        )
    try:
        return flatten_state_dict(cast("dict[str, Any]", state))
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"the state can't be flattened into keys: {error}") from error


def _check_kind(key: str, tensor: torch.Tensor) -> None:
    kind = None
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        kind = type(tensor).__name__
    elif tensor.layout is not torch.strided or tensor.is_nested:
        kind = str(tensor.layout).removeprefix("torch.")
    elif tensor.is_quantized:
        kind = "quantised"
    if kind is not None:
        refuse_kind(key, kind)


def _is_apart(leaf: object) -> bool:
    """Return True for a tensor whose memory can be taken as it is."""
    return isinstance(leaf, torch.Tensor) and not leaf.is_conj() and not leaf.is_neg()


def _overlapping(spans: list[tuple[int, int, str]]) -> Iterator[tuple[str, ...]]:
    """Yield groups of names whose spans of memory have bytes in common."""
    group: list[str] = []
    end = 0
    for start, stop, key in sorted(spans):
        if start == stop:
            continue
        if start >= end:
            if len(group) > 1:
                yield tuple(group)
            group = []
        group.append(key)
        end = max(end, stop)
    if len(group) > 1:
        yield tuple(group)


def _without_memory(nbytes: int) -> torch.UntypedStorage:
    make: Any = torch.UntypedStorage
    made: torch.UntypedStorage = make(nbytes, device="meta")
    return made


def _address(storage: torch.UntypedStorage) -> int:
    """Return the address by which torch tells storages apart. It is valid as long as the storage exists."""
    return torch_private.storage_identity(storage)


def _storages_in(value: object) -> frozenset[int]:
    """Return the storages of the tensors that a value holds, by their addresses."""
    finder = _Finder(io.BytesIO())
    try:
        finder.dump(value)
    except CheckpointError:
        raise
    except Exception as error:  # what does not pickle can raise nearly anything
        raise ConfigurationError(f"a value can't be saved: {type(error).__name__}: {error}") from error
    return frozenset(finder.found)


class _Finder(pickle.Pickler):
    """A pickler that is after tensors alone."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.found: set[int] = set()

    def persistent_id(self, obj: Any) -> int | None:
        if isinstance(obj, torch.Tensor):
            _check_kind("a tensor within a value", obj)
            obj = obj.untyped_storage()
        if isinstance(obj, torch.storage.TypedStorage):
            obj = torch_private.untyped(obj)
        if isinstance(obj, torch.UntypedStorage):
            self.found.add(_address(obj))
            return _address(obj)
        return None
