"""What the ranks wrote, gathered on the coordinator and put into the order and the terms of the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from cloudckpt.backends import metadata as md
from cloudckpt.backends.commit import RankReport

Place: TypeAlias = tuple[str, torch.Size | None]
"""An item's name and offsets: what a ``MetadataIndex`` goes by, and hashed and compared faster."""


class MissingItemError(Exception):
    """An item of the plan that no rank wrote."""

    def __init__(self, index: MetadataIndex) -> None:
        super().__init__(index)
        self.index = index


def gathered(results: Iterable[Iterable[WriteResult]]) -> tuple[dict[Place, _StorageInfo], list[RankReport]]:
    """Tell items and reports apart in the results of all ranks."""
    items: dict[Place, _StorageInfo] = {}
    reports: list[RankReport] = []
    for of_rank in results:
        for result in of_rank:
            data = result.storage_data
            if isinstance(data, _StorageInfo):
                index = result.index
                items[index.fqn, index.offset] = data
            elif isinstance(data, RankReport):
                reports.append(data)
    return items, reports


def shared(metadata: Metadata, items: Mapping[Place, _StorageInfo]) -> dict[MetadataIndex, _StorageInfo]:
    """The items of the plan under its own names and offsets, in its order, with what is alike made one.

    What is one object is pickled once; the copies that come from the ranks are a third of a large pickle.

    Raises:
        MissingItemError: the plan has an item that ``items`` lacks.
    """
    sizes: dict[torch.Size, torch.Size] = {}
    spans: dict[object, object] = {}
    found: dict[MetadataIndex, _StorageInfo] = {}
    for fqn, chunk in md.planned_chunks(metadata):
        index, offsets = MetadataIndex(fqn), None
        if chunk is not None:
            chunk.sizes = _one(sizes, chunk.sizes)
            chunk.offsets = offsets = _one(sizes, chunk.offsets)
            index.__dict__["offset"] = offsets  # its constructor would make another copy
        info = items.get((fqn, offsets))
        if info is None:
            raise MissingItemError(index)
        noted = info.__dict__
        if (its := noted.get("spans")) is not None:
            noted["spans"] = spans.setdefault(its, its)
        found[index] = info
    return found


def _one(sizes: dict[torch.Size, torch.Size], size: Sequence[int]) -> torch.Size:
    """Return the first of all sizes that are equal to this one."""
    its = size if isinstance(size, torch.Size) else torch.Size(size)
    return sizes.setdefault(its, its)
