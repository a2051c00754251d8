"""Hugging Face's safetensors: eight bytes of length, a JSON header, and the tensors' bytes end to end.

https://huggingface.co/docs/safetensors describes the format. A state that is larger than a shard becomes
several files and an index that says which tensor is in which, named as ``huggingface_hub`` names them.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.convert.publish import Planned
from cloudckpt.backends.convert.state_source import Entry, Source
from cloudckpt.backends.errors import ConfigurationError, IntegrityError, ObjectNotFoundError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.format.tensor_archive import Payload
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.transfer.downloader import Downloader
from cloudckpt.backends.transfer.segments import Segment, View

SUFFIX: Final = ".safetensors"
WHOLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_METADATA: Final = "__metadata__"
_FOR_TORCH: Final = {"format": "pt"}
"""Without this, transformers does not load a file."""
_LONGEST_HEADER: Final = 100_000_000
"""Bytes; the safetensors library reads no longer one."""
_LENGTH: Final = 8
"""Bytes before the header, which say how long it is."""
_ALIGNED: Final = 8
_MOST_DIMENSIONS: Final = 64
"""What torch takes."""
_DTYPES: Final[Mapping[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TORCH: Final = {name: dtype for dtype, name in _DTYPES.items()}


def obstacle(entry: Entry) -> str | None:
    """Why a tensor can't be in a safetensors file; None where it can."""
    return None if entry.dtype in _DTYPES else str(entry.dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to write: its header, and the tensors that follow it."""

    name: str
    header: bytes
    tensors: tuple[Entry, ...]

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, Entry]) -> Shard:
        """Return the file of named tensors: those of large elements first, so that all are aligned."""
        ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
        header: dict[str, Any] = {_METADATA: _FOR_TORCH}
        at = 0
        for key, entry in ordered:
            offsets = [at, at + entry.nbytes]
            header[key] = {"dtype": _DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": offsets}
            at = offsets[1]
        data = json.dumps(header, separators=(",", ":")).encode()
        data += b" " * (-len(data) % _ALIGNED)
        if len(data) > _LONGEST_HEADER:
            raise ConfigurationError(
                f"the header of {name} would have {len(data):,} bytes, and safetensors reads "
                f"{_LONGEST_HEADER:,} at most",
                hint="Make the shards smaller, or select fewer keys",
            )
        return cls(name, len(data).to_bytes(_LENGTH, "little") + data, tuple(entry for _, entry in ordered))

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(entry.nbytes for entry in self.tensors)

    def planned(self, source: Source) -> Planned:
        """Return the file as an object to put."""
        return Planned(self.nbytes, self._segments(source))

    def _segments(self, source: Source) -> Iterator[Segment]:
        yield View(memoryview(self.header), borrowed=False)
        for entry in self.tensors:
            yield source.segment(entry)


def sharded(tensors: Mapping[str, Entry], shard_size: int) -> tuple[list[Shard], bytes | None]:
    """Part tensors into files of at most ``shard_size`` bytes, in their order, and make the index of them.

    A tensor that is larger has a file of its own. There is no index where there is one file.
    """
    groups: list[dict[str, Entry]] = [{}]
    size = 0
    for key, entry in tensors.items():
        if groups[-1] and size + entry.nbytes > shard_size:
            groups.append({})
            size = 0
        groups[-1][key] = entry
        size += entry.nbytes
    if len(groups) == 1:
        return [Shard.of(WHOLE, groups[0])], None
    count = len(groups)
    shards = [
        Shard.of(f"model-{at:05}-of-{count:05}{SUFFIX}", group) for at, group in enumerate(groups, start=1)
    ]
    index = {
        "metadata": {"total_size": sum(entry.nbytes for entry in tensors.values())},
        "weight_map": {
            key: shard.name for shard, group in zip(shards, groups, strict=True) for key in sorted(group)
        },
    }
    return shards, f"{json.dumps(index, indent=2)}\n".encode()


def written_before(store: ObjectStore) -> list[str]:
    """Return the objects in a folder that are files of a model: the index first."""
    names = {info.name for info in store.list("", delimiter=True).objects}
    # Shards that are deleted before an index that is not listed yet would leave it without them.
    names |= {name for name in (INDEX, WHOLE) if name not in names and store.holds(name)}
    found = [name for name in names if name in (INDEX, WHOLE) or _SHARD.fullmatch(name)]
    return sorted(found, key=lambda name: (name != INDEX, name))


def open_file(store: ObjectStore, name: str, target: Target, memory_limit: int) -> Source:
    """Return a safetensors file as a source of tensors.

    Raises:
        ObjectNotFoundError: it is not there.
        IntegrityError: it is damaged.
    """
    return _open(store, [name], target, memory_limit)


def open_folder(store: ObjectStore, target: Target, memory_limit: int) -> Source:
    """Return the files that an index names, or the one that there is, as a source of tensors.

    Raises:
        ObjectNotFoundError: neither is there.
        IntegrityError: one is damaged, missing, or has other tensors than the index says.
    """
    try:
        data, _ = store.get(INDEX)
    except ObjectNotFoundError:
        return _open(store, [WHOLE], target, memory_limit)
    try:
        index: Any = json.loads(data)
        mapping = {str(key): str(name) for key, name in index["weight_map"].items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(store, INDEX, f"the index can't be read: {error}") from error
    names = list(dict.fromkeys(mapping.values()))
    if odd := [name for name in names if "/" in name or not name.endswith(SUFFIX)]:
        raise _damaged(store, INDEX, f"the index names {odd[0]!r}, which is no safetensors file beside it")
    return _open(store, names, target, memory_limit, mapping)


def _open(
    store: ObjectStore,
    names: Sequence[str],
    target: Target,
    memory_limit: int,
    mapping: Mapping[str, str] | None = None,
) -> Source:
    infos = {name: store.stat(name) for name in names}
    sizes = {name: info.size for name, info in infos.items()}
    downloader = Downloader(store, max(1, target.options.concurrency // 2), memory_limit, sizes)
    metadata = Metadata({}, storage_data={})
    headers = downloader.each(functools.partial(_header, store, sizes), names)
    for name, (begin, tensors) in zip(names, headers, strict=True):
        for key, described in tensors.items():
            if key in metadata.state_dict_metadata:
                raise _damaged(store, name, f"{key!r} is in two files")
            if mapping is not None and mapping.get(key) != name:
                raise _damaged(store, name, f"the index does not say that {key!r} is in it")
            _add(metadata, name, begin, key, described)
    if mapping is not None and (missing := mapping.keys() - metadata.state_dict_metadata.keys()):
        raise _damaged(store, INDEX, f"the index says of {min(missing)!r} where it is, and it is not there")

    def check() -> None:
        for name, info in infos.items():
            if store.stat(name).version != info.version:
                raise _damaged(store, name, "it was overwritten while it was read", "Convert it again")

    return Source(store, metadata, downloader, check=check)


_Described = tuple[torch.dtype, tuple[int, ...], int, int]


def _header(store: ObjectStore, sizes: Mapping[str, int], name: str) -> tuple[int, dict[str, _Described]]:
    """Read a file's header: where the tensors begin, and dtype, shape, first byte and end of each."""
    size = sizes[name]
    length = bytearray(_LENGTH)
    if size < _LENGTH:
        raise _damaged(store, name, f"it has {size} bytes, too few for a safetensors file")
    store.read_into(name, 0, [memoryview(length)])
    count = int.from_bytes(length, "little")
    if count > min(size - _LENGTH, _LONGEST_HEADER):
        raise _damaged(store, name, f"its header claims {count:,} bytes")
    data = bytearray(count)
    store.read_into(name, _LENGTH, [memoryview(data)])
    begin = _LENGTH + count
    try:
        header = json.loads(data, object_pairs_hook=_once)
        header.pop(_METADATA, None)
        tensors = {str(key): _described(key, held) for key, held in header.items()}
        _check_layout(tensors, size - begin)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(store, name, f"its header is not sound: {error}") from error
    return begin, tensors


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _described(key: str, held: Mapping[str, Any]) -> _Described:
    if held["dtype"] not in _TORCH:
        raise ValueError(f"{key!r} is of a type that is not known here: {held['dtype']!r}")
    dtype, shape = _TORCH[held["dtype"]], tuple(held["shape"])
    start, stop = held["data_offsets"]
    if len(shape) > _MOST_DIMENSIONS or not all(
        type(number) is int and 0 <= number < 1 << 62 for number in (*shape, start, stop)
    ):
        raise ValueError(f"the shape or the place of {key!r} is not made of sizes")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{key!r} has {stop - start} bytes for shape {list(shape)} of {held['dtype']}")
    return dtype, shape, start, stop


def _check_layout(tensors: Mapping[str, _Described], size: int) -> None:
    """Tensors lie end to end and fill the file: nothing overlaps, and nothing is hidden between them."""
    at = 0
    for key, (_, _, start, stop) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if start != at:
            raise ValueError(f"{key!r} begins at byte {start} of the data, and not at {at}")
        at = stop
    if at != size:
        raise ValueError(f"its tensors have {at} bytes, and {size} follow it")


def _add(metadata: Metadata, name: str, begin: int, key: str, described: _Described) -> None:
    dtype, shape, start, stop = described
    nowhere, size = torch.Size([0] * len(shape)), torch.Size(shape)
    metadata.state_dict_metadata[key] = TensorStorageMetadata(
        TensorProperties(dtype), size, [ChunkStorageMetadata(nowhere, size)]
    )
    place = md.storage_info(name, begin + start, stop - start, Payload(0, dtype))
    metadata.storage_data[MetadataIndex(key, nowhere)] = place


def _damaged(
    store: ObjectStore, name: str, message: str, hint: str = "It is damaged: get it anew"
) -> IntegrityError:
    return IntegrityError(message, uri=store.uri, object_name=name, hint=hint)
