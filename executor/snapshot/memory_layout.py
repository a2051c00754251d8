"""The layout of a snapshot in the arena. Memory that tensors share is there once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cloudckpt.backends.strides import row_major, span

_ALIGNMENT = 64
"""Bytes: a cache line, and more than any dtype asks for."""

_SCATTERED = 2
"""A tensor that spans more than so many times its own size is gathered, not copied as it lies."""


class View(NamedTuple):
    """A tensor as a view of an extent; ``offset`` is in bytes from where the extent begins."""

    extent: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Source(NamedTuple):
    """Bytes to copy into an extent: a stretch of a storage, or a tensor to gather row by row."""

    memory: torch.UntypedStorage | torch.Tensor
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a snapshot. ``offsets`` are of each source's extent in the arena, in bytes."""

    views: list[View]
    sources: list[Source]
    offsets: list[int]
    nbytes: int

    @property
    def devices(self) -> set[torch.device]:
        """The CUDA devices that sources are on."""
        return {device for source in self.sources if (device := source.memory.device).type == "cuda"}


def lay_out(tensors: Sequence[torch.Tensor]) -> Layout:
    """Find the stretches of memory that the tensors cover, and give each a place."""
    placed: list[View | None] = [None] * len(tensors)
    sources: list[Source] = []
    stretches: dict[tuple[torch.device, int], list[tuple[int, int, int]]] = {}
    storages: dict[tuple[torch.device, int], torch.UntypedStorage] = {}
    for index, tensor in enumerate(tensors):
        shape, stride, dtype = tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype
        numel, itemsize = tensor.numel(), tensor.itemsize
        if numel == 0:
            placed[index] = View(-1, 0, dtype, shape, stride)
            continue
        length = numel if tensor.is_contiguous() else span(shape, stride)
        if length > _SCATTERED * numel or tensor.is_conj() or tensor.is_neg():
            gathered = tensor.resolve_conj().resolve_neg()
            placed[index] = View(len(sources), 0, dtype, shape, row_major(shape))
            sources.append(Source(gathered, 0, numel * itemsize))
            continue
        storage = tensor.untyped_storage()
        key = (tensor.device, storage.data_ptr())
        storages[key] = storage
        start = int(tensor.storage_offset()) * itemsize
        stretches.setdefault(key, []).append((start, start + length * itemsize, index))
    for key, parts in stretches.items():
        _merge(parts, storages[key], tensors, placed, sources)
    offsets: list[int] = []
    end = 0
    for source in sources:
        offsets.append(end)
        end += -(-source.nbytes // _ALIGNMENT) * _ALIGNMENT
    return Layout([view for view in placed if view is not None], sources, offsets, end)


def _merge(
    parts: list[tuple[int, int, int]],
    storage: torch.UntypedStorage,
    tensors: Sequence[torch.Tensor],
    placed: list[View | None],
    sources: list[Source],
) -> None:
    """One extent for each run of overlapping stretches of a storage."""
    if len(parts) > 1:
        parts.sort()
    at = 0
    while at < len(parts):
        first = at
        # An extent begins on a boundary, so that every element in it is aligned as it was.
        start, end = parts[at][0] // _ALIGNMENT * _ALIGNMENT, parts[at][1]
        while at < len(parts) and parts[at][0] < end:
            end = max(end, parts[at][1])
            at += 1
        for begin, _, index in parts[first:at]:
            tensor = tensors[index]
            placed[index] = View(
                len(sources), begin - start, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())
            )
        sources.append(Source(storage, start, end - start))
