"""A state to convert, wherever it lies: described as DCP describes a checkpoint, and fetched bit by bit.

A ``torch.save`` file and a safetensors file are, like a data object, raw memory of tensors at known offsets.
So each is given the ``Metadata`` that a checkpoint of it would have, and the one load path reads all three:
ranges, strides, shards and checksums are its business.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from cloudckpt.backends import strides
from cloudckpt.backends.errors import CheckpointError, ConfigurationError, IntegrityError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.load.read_plan import load
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.transfer.downloader import Downloader
from cloudckpt.backends.transfer.segments import Fetched, Wanted

Path = tuple[str | int, ...]
"""Keys and indices, from the outermost container of a state to one of its entries."""
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and lengths."""
_LARGEST = 1 << 60
"""Bytes of a tensor."""
_QUANTISED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that lies where its source does."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Elements; dense, in the order in which it lies there, or row-major."""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_major(self) -> Entry:
        """The same tensor, to be fetched in row-major order."""
        return Entry(self.key, self.dtype, self.shape, strides.row_major(self.shape))


class Source:
    """A state that is read where it lies.

    Args:
        store: where it lies.
        metadata: what a checkpoint of it would say.
        downloader: reads its objects.
        paths: where an entry is in the nested state, by key; without one, its key is its place.
        held: what is in memory already, by key.
        shared: keys of tensors that have memory in common.
        check: raises where the source has changed since it was opened.
        trust: let values run code of whoever wrote them.
    """

    def __init__(
        self,
        store: ObjectStore,
        metadata: Metadata,
        downloader: Downloader,
        *,
        paths: Mapping[str, Path] | None = None,
        held: Mapping[str, Any] | None = None,
        shared: Sequence[tuple[str, ...]] = (),
        check: Callable[[], None] | None = None,
        trust: bool = False,
    ) -> None:
        self.store = store
        self._metadata = metadata
        self._downloader = downloader
        self.paths = paths or {}
        self._held = held or {}
        self.shared = shared
        self._check = check
        self._trust = trust
        self._fetched: dict[str, Entry] = {}

    @property
    def keys(self) -> list[str]:
        """Of all tensors and values, in their order."""
        return [*self._metadata.state_dict_metadata]

    def entries(self, keys: Iterable[str]) -> dict[str, Entry]:
        """Return the tensors among these keys that lie in the store.

        Raises:
            ConfigurationError: one is sparse or quantised.
            IntegrityError: its shards can't make it up.
        """
        described = self._metadata.state_dict_metadata
        return {
            key: self._entry(key, tensor)
            for key in keys
            if isinstance(tensor := described[key], TensorStorageMetadata) and key not in self._held
        }

    def tensors_held(self, keys: Iterable[str]) -> list[str]:
        """Return the tensors among these keys that are in memory, since they had to be computed."""
        return [key for key in keys if isinstance(self._held.get(key), torch.Tensor)]

    def values(self, keys: Sequence[str]) -> dict[str, Any]:
        """Return the values of these keys that are not among the entries, all of them in memory.

        Raises:
            UnsafeCheckpointError: reading one would run code.
            IntegrityError: one is damaged.
        """
        described = self._metadata.state_dict_metadata
        stored = [
            key
            for key in keys
            if key not in self._held and not isinstance(described[key], TensorStorageMetadata)
        ]
        values = _Values()
        self._load([_whole(key) for key in stored], values)
        found = {**values.found, **self._held}
        return {key: found[key] for key in keys if key in found}

    def segment(self, entry: Entry, seen: Callable[[int, memoryview], None] | None = None) -> Fetched:
        """Return the memory of a tensor, in the order that its entry's strides say. One order a tensor."""
        self._fetched[entry.key] = entry
        return Fetched(self, entry.key, entry.nbytes, entry.dtype.itemsize, seen)

    def fetch(self, wanted: Sequence[Wanted]) -> None:
        """Read ranges of tensors.

        Raises:
            IntegrityError: they are not what was saved, or not all there.
        """
        destinations = _Destinations()
        items = [item for one in wanted for item in self._items(one, destinations)]
        self._load(items, destinations)

    def ensure_unchanged(self) -> None:
        """Make sure that all that was read is of one version.

        Raises:
            IntegrityError: the source was overwritten meanwhile.
        """
        if self._check is not None:
            self._check()

    def _load(self, items: Sequence[ReadItem], planner: object) -> None:
        try:
            load(items, cast(LoadPlanner, planner), self._metadata, self._downloader, trust=self._trust)
        except CheckpointError as error:
            error.located(uri=self.store.uri)
            raise

    def _entry(self, key: str, tensor: TensorStorageMetadata) -> Entry:
        shape, dtype, layout = tuple(tensor.size), tensor.properties.dtype, tensor.properties.layout
        if layout is not torch.strided or dtype in _QUANTISED:
            refuse_kind(key, "quantised" if dtype in _QUANTISED else str(layout).removeprefix("torch."))
        shards = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks]
        if math.prod(shape) * dtype.itemsize > _LARGEST or not make_up(shape, shards):
            raise IntegrityError(
                f"the shards of {key!r} do not make up a tensor of shape {list(shape)}",
                uri=self.store.uri,
                hint="The checkpoint is damaged; convert another step",
            )
        stride = strides.row_major(shape)
        if len(tensor.chunks) == 1:
            info = self._metadata.storage_data.get(MetadataIndex(key, tensor.chunks[0].offsets))
            payload = None if info is None else md.payload_of(info)
            if payload is not None and payload.stride and len(payload.stride) == len(shape):
                stride = payload.stride if strides.is_dense(shape, payload.stride) else stride
        return Entry(key, dtype, shape, stride)

    def _items(self, wanted: Wanted, destinations: _Destinations) -> Iterator[ReadItem]:
        """Return the items to read of each shard."""
        if wanted.first == wanted.last:
            return
        entry = self._fetched[wanted.key]
        tensor = cast(TensorStorageMetadata, self._metadata.state_dict_metadata[wanted.key])
        flat = torch.frombuffer(wanted.into, dtype=torch.uint8).view(entry.dtype)
        order = sorted(range(len(entry.shape)), key=lambda dim: -entry.stride[dim])
        places = sorted(range(len(order)), key=order.__getitem__)
        done = 0
        for starts, lengths in boxes(tuple(entry.shape[dim] for dim in order), wanted.first, wanted.last):
            count = math.prod(lengths)
            target = flat[done : done + count].view(lengths).permute(places)
            box = tuple(starts[at] for at in places), tuple(lengths[at] for at in places)
            done += count
            for chunk in tensor.chunks:
                offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
                common = overlap(box, (offsets, sizes))
                if common is None:
                    continue
                index = MetadataIndex(wanted.key, index=len(destinations.tensors))
                into = target
                for dim, (at, length) in enumerate(zip(*common, strict=True)):
                    into = into.narrow(dim, at - box[0][dim], length)
                destinations.tensors.append(into)
                within = [at - first for at, first in zip(common[0], offsets, strict=True)]
                yield ReadItem(
                    LoadItemType.TENSOR,
                    index,
                    torch.Size([0] * len(within)),
                    MetadataIndex(wanted.key, chunk.offsets),
                    torch.Size(within),
                    torch.Size(common[1]),
                )


class _Destinations:
    """A load planner, as far as one is asked, for boxes of tensors."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return self.tensors[item.dest_index.index or 0]

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do."""


class _Values:
    """A load planner, as far as one is asked, for values."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        # It was proven before, or the caller trusts its writer.
        self.found[item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=False)


def refuse_kind(key: str, kind: str) -> NoReturn:
    """Say of a tensor that no plain memory makes it up.

    Raises:
        ConfigurationError: always.
    """
    raise ConfigurationError(
        f"{key!r} is a tensor of another kind than a plain one: {kind}",
        hint="Make it a dense tensor and save again; of a checkpoint, keys without it can be selected",
    )


def _whole(key: str) -> ReadItem:
    index, nowhere = MetadataIndex(key), torch.Size([0])
    return ReadItem(LoadItemType.BYTE_IO, index, nowhere, index, nowhere, nowhere)


def boxes(shape: tuple[int, ...], first: int, last: int) -> Iterator[Box]:
    """Yield the boxes that hold elements ``first`` to ``last`` of a row-major tensor, in their order."""
    if len(shape) <= 1:
        yield ((first,), (last - first,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    top, bottom = first // row, -(-last // row)
    if first > top * row or (top + 1 == bottom and last < bottom * row):
        stop = min(last, (top + 1) * row)
        for offsets, lengths in boxes(shape[1:], first - top * row, stop - top * row):
            yield (top, *offsets), (1, *lengths)
        first, top = stop, top + 1
    if (whole := last // row - top) > 0:
        yield (top, *(0 for _ in shape[1:])), (whole, *shape[1:])
        first, top = (top + whole) * row, top + whole
    if first < last:
        for offsets, lengths in boxes(shape[1:], 0, last - first):
            yield (top, *offsets), (1, *lengths)


def overlap(one: Box, other: Box) -> Box | None:
    """Return the intersection of two boxes; None where it is empty."""
    starts = [max(a, b) for a, b in zip(one[0], other[0], strict=True)]
    stops = [min(a + m, b + n) for a, m, b, n in zip(*one, *other, strict=True)]
    lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
    return (tuple(starts), tuple(lengths)) if all(length > 0 for length in lengths) else None


def make_up(shape: tuple[int, ...], parts: Sequence[Box]) -> bool:
    """Return True if boxes fill a shape without a hole and without overlap."""
    if sum(math.prod(lengths) for _, lengths in parts) != math.prod(shape):
        return False
    whole = tuple(0 for _ in shape), shape
    if any(math.prod(part[1]) and overlap(part, whole) != part for part in parts):
        return False
    # Along the dimension in which most of them lie, few are side by side.
    dims = range(len(shape))
    along = max(dims, key=lambda dim: len({offsets[dim] for offsets, _ in parts}), default=None)
    if along is None:
        return len(parts) == 1
    beside: list[Box] = []
    for part in sorted(parts, key=lambda part: part[0][along]):
        beside = [one for one in beside if one[0][along] + one[1][along] > part[0][along]]
        if any(overlap(one, part) for one in beside):
            return False
        beside.append(part)
    return True
