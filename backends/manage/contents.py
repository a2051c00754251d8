"""The contents of a checkpoint by its metadata, as plain values to be shown or compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from cloudckpt.backends.checksums import FRAMED, Algorithm, Checks, count_chunks
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.config.uri_hints import advice
from cloudckpt.backends.errors import CheckpointNotFoundError, ObjectNotFoundError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.format.committed import listed_metadata
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.torch_private import StorageInfo


@dataclass(frozen=True, slots=True)
class Sums:
    """The checksums of some bytes. Those of the same bytes are equal, if they were taken in the same way."""

    way: tuple[object, ...]
    """Algorithm, order of elements in memory, bytes of each segment."""
    packed: bytes


@dataclass(frozen=True, slots=True)
class Shard:
    """A box of a tensor, or a whole value, as it is stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    sums: Sums | None
    """None where its writer took none."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint."""

    key: str
    dtype: str
    """As torch names it, such as ``bfloat16``."""
    shape: tuple[int, ...]
    size: int
    """Bytes of its elements."""
    shards: tuple[Shard, ...]
    """In order of their offsets."""


@dataclass(frozen=True, slots=True)
class StoredValue:
    """Anything else that a checkpoint holds."""

    key: str
    size: int
    """Bytes as it is stored."""
    content: Shard


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A data object."""

    name: str
    size: int
    """Bytes; what its items need at least, where its writer did not note it."""


@dataclass(frozen=True, slots=True)
class Contents:
    """A committed checkpoint."""

    uri: str
    version: str | None
    """Of this library that wrote it; None where a stock writer did."""
    save_id: str | None
    committed_at: datetime | None
    """By the store's clock, where it tells."""
    tensors: tuple[StoredTensor, ...]
    """By key, like the others by key or name."""
    values: tuple[StoredValue, ...]
    objects: tuple[StoredObject, ...]

    @property
    def stored(self) -> dict[str, StoredTensor | StoredValue]:
        """Tensors and values, by key."""
        return {**{one.key: one for one in self.tensors}, **{one.key: one for one in self.values}}


def contents_at(target: Target) -> Contents:
    """Read what the checkpoint at a target holds. Nothing that it says is run, and no data object read.

    Raises:
        CheckpointNotFoundError: nothing is committed there.
        UnsafeCheckpointError: reading its metadata would run code.
        IntegrityError: its metadata is damaged.
        StorageError: the store could not be read.
    """
    with open_store(target) as store:
        try:
            data, info = store.get(md.METADATA_NAME)
        except ObjectNotFoundError as error:
            raise _absence(store) from error
        metadata = md.load(data, uri=store.uri)
    return contents(metadata, store.uri, info.modified)


def contents(metadata: Metadata, uri: str, committed_at: datetime | None = None) -> Contents:
    """Return the contents of the checkpoint at ``uri``, by its metadata."""
    algorithms = md.algorithms_of(metadata)
    tensors: list[StoredTensor] = []
    values: list[StoredValue] = []
    for key, entry in sorted(metadata.state_dict_metadata.items()):
        if isinstance(entry, TensorStorageMetadata):
            shards = [
                Shard(
                    tuple(chunk.offsets),
                    tuple(chunk.sizes),
                    _sums(metadata.storage_data.get(MetadataIndex(key, chunk.offsets)), algorithms),
                )
                for chunk in entry.chunks
            ]
            dtype = entry.properties.dtype
            tensors.append(
                StoredTensor(
                    key,
                    str(dtype).removeprefix("torch."),
                    tuple(entry.size),
                    math.prod(entry.size) * dtype.itemsize,
                    tuple(sorted(shards, key=lambda shard: (shard.offsets, shard.sizes))),
                )
            )
        else:
            info = metadata.storage_data.get(MetadataIndex(key))
            values.append(
                StoredValue(key, info.length if info else 0, Shard((), (), _sums(info, algorithms)))
            )
    sizes = md.least_sizes(metadata) | md.sizes_of(metadata)
    return Contents(
        uri,
        md.version_of(metadata),
        md.save_id_of(metadata),
        committed_at,
        tuple(tensors),
        tuple(values),
        tuple(StoredObject(name, sizes[name]) for name in sorted(md.objects_of(metadata))),
    )


def _sums(info: StorageInfo | None, algorithms: dict[str, Algorithm]) -> Sums | None:
    checks = None if info is None else md.checks_of(info, algorithms)
    if info is None or checks is None:
        return None
    payload = md.payload_of(info)
    if payload is not None and len(checks.spans) == FRAMED:
        # What surrounds a tensor's bytes may be spelt in another way by another version of torch.
        return Sums((checks.algorithm.name, payload.stride, checks.spans[1]), _of_payload(checks))
    return Sums((checks.algorithm.name, "whole", checks.spans), checks.sums)


def _of_payload(checks: Checks) -> bytes:
    width = checks.algorithm.width
    start = count_chunks(checks.spans[:1]) * width
    return checks.sums[start : start + count_chunks(checks.spans[1:2]) * width]


def _absence(store: ObjectStore) -> CheckpointNotFoundError:
    alone = listed_metadata(store)
    return CheckpointNotFoundError(
        "ranks saved here without each other, and there is no metadata of all of them"
        if alone
        else "there is no committed checkpoint here",
        uri=store.uri,
        object_name=md.METADATA_NAME,
        hint="`cloudckpt verify` reads each rank's own"
        if alone
        else advice(store.uri, "Check the URI; a save that never committed leaves none"),
    )
