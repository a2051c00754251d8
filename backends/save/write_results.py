"""The write results of all ranks, gathered on the coordinator and mapped to the items of the plan."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeAlias

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from cloudckpt.backends.errors import CommitError, note_others
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.save.commit import RankReport
from cloudckpt.backends.torch_private import StorageInfo
from cloudckpt.backends.transfer.gc_pause import no_collection

_Offsets: TypeAlias = Mapping[torch.Size | None, torch.Size | None]
"""Those of an entry's shards, each as the one object that stands for all that are equal."""
_DATA: Final = operator.attrgetter("storage_data")
_WHOLE: Final[_Offsets] = {None: None}
"""Of an entry that is no tensor: it is not cut."""


class MissingItemError(Exception):
    """An item of the plan that no rank wrote."""

    def __init__(self, index: MetadataIndex) -> None:
        super().__init__(index)
        self.index = index


def reports_in(results: Iterable[Iterable[WriteResult]]) -> list[RankReport]:
    """Return the reports of the ranks, which stand among their items."""
    everything = map(_DATA, itertools.chain.from_iterable(results))
    return [data for data in everything if isinstance(data, RankReport)]


def raise_failures(reports: Sequence[RankReport]) -> None:
    """Raise what failed on the lowest rank, with notes on what failed on others."""
    failures = [(report.rank, report.failure) for report in reports if report.failure is not None]
    if failures:
        _, first = failures[0]
        note_others(first, dict(failures[1:]))
        raise first


def stored(
    metadata: Metadata, results: Iterable[Iterable[WriteResult]], uri: str
) -> dict[MetadataIndex, StorageInfo]:
    """Return where each item of the plan was written, as `shared`.

    Raises:
        CommitError: an item has no result; a checkpoint without it would list and not load.
    """
    try:
        with no_collection():
            return shared(metadata, results)
    except MissingItemError as missing:
        fqn, offsets = missing.index.fqn, missing.index.offset
        raise CommitError(
            f"no rank wrote {fqn!r}" + (f" at {tuple(offsets)}" if offsets is not None else ""),
            uri=uri,
            hint="The save planner planned an item that no rank was given; nothing was committed",
        ) from None


def shared(metadata: Metadata, results: Iterable[Iterable[WriteResult]]) -> dict[MetadataIndex, StorageInfo]:
    """Return the place of every item of the plan, in the order of ``results``, with equal values shared.

    What is one object is pickled once; the copies that come from the ranks are a third of a large pickle. So
    tensors of one shape have their chunks in common. The order is that in which the ranks' results lie in
    memory: it takes half the time of any other.

    Raises:
        MissingItemError: the plan has an item that is not in ``results``.
    """
    planned = _planned(metadata)
    spans: dict[object, object] = {}
    found: dict[MetadataIndex, StorageInfo] = {}
    for of_rank in results:
        for result in of_rank:
            index, info = result.index, result.storage_data
            named = index.__dict__
            try:
                fqn, offsets = planned[named["fqn"]]
                its = offsets[named.get("offset")]
            except KeyError:  # a report, or what was not asked for
                continue
            if not isinstance(info, StorageInfo):
                continue
            named["fqn"] = fqn
            if its is not None:
                named["offset"] = its
            noted = info.__dict__
            if (of_parts := noted.get("spans")) is not None:
                noted["spans"] = spans.setdefault(of_parts, of_parts)
            found[index] = info
    expected = sum(len(offsets) for _, offsets in planned.values())
    if len(found) < expected and (missing := md.missing_item(metadata, found)) is not None:
        raise MissingItemError(missing)
    return found


def _planned(metadata: Metadata) -> dict[str, tuple[str, _Offsets]]:
    """Return the plan's name and offsets of every entry. Equal chunks are shared, also in ``metadata``."""
    tensors: dict[str, TensorStorageMetadata] = {}
    planned: dict[str, tuple[str, _Offsets]] = {}
    for fqn, entry in metadata.state_dict_metadata.items():
        planned[fqn] = fqn, _WHOLE
        if isinstance(entry, TensorStorageMetadata):
            tensors[fqn] = entry
    _share_chunks(tensors.values())
    cuts: dict[tuple[int, ...], _Offsets] = {}
    for fqn, entry in tensors.items():
        cut = tuple(map(id, entry.chunks))
        if cut not in cuts:
            cuts[cut] = {chunk.offsets: chunk.offsets for chunk in entry.chunks}
        planned[fqn] = fqn, cuts[cut]
    return planned


def _share_chunks(tensors: Iterable[TensorStorageMetadata]) -> None:
    """Make equal chunks one, rank by rank again: tensors of as many chunks side by side."""
    sizes: dict[torch.Size, torch.Size] = {}
    alike: dict[tuple[torch.Size, torch.Size], ChunkStorageMetadata] = {}
    of_count: dict[int, list[list[ChunkStorageMetadata]]] = {}
    for tensor in tensors:
        tensor.chunks = [*tensor.chunks]
        of_count.setdefault(len(tensor.chunks), []).append(tensor.chunks)
    for count, side_by_side in of_count.items():
        for place in range(count):
            for chunks in side_by_side:
                chunks[place] = _one(chunks[place], alike, sizes)


def _one(
    chunk: ChunkStorageMetadata,
    alike: dict[tuple[torch.Size, torch.Size], ChunkStorageMetadata],
    sizes: dict[torch.Size, torch.Size],
) -> ChunkStorageMetadata:
    """Return the first of all chunks that are equal to this one, made of the first of all equal sizes."""
    key = offsets, size = chunk.offsets, chunk.sizes
    if not type(offsets) is type(size) is torch.Size:  # a planner of one's own may be less exact
        key = offsets, size = torch.Size(offsets), torch.Size(size)
    one = alike.get(key)
    if one is None:
        one = ChunkStorageMetadata(sizes.setdefault(offsets, offsets), sizes.setdefault(size, size))
        alike[key] = one
    return one
