"""Positions of a tensor's shards in the whole, from which DCP plans, compared with the memory.

DCP plans a DTensor from its spec, a ShardedTensor from its metadata and, since torch 2.14, a tensor with the
attributes of ``CheckpointableTensor`` from those. It does not compare them with the tensors themselves.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from cloudckpt.backends.torch_private import (
    ShardedTensorBase,
    StridedShard,
    compute_local_shape_and_global_offset,
    flatten_sharded_tensors,
    local_tensor,
)

SHARD_ATTRIBUTES = ("global_shape", "global_offsets", "local_offsets", "local_sizes")
"""Attributes that make a tensor a ``CheckpointableTensor``."""

PLANNED = hasattr(dcp, "CheckpointableTensor")
"""True where DCP plans by them: torch 2.14 and newer."""

_MISSING = object()

_Sizes = tuple[int, ...]


class ShardAttributes(NamedTuple):
    """Shards of a global tensor that a local one holds, as ``CheckpointableTensor`` describes them."""

    global_shape: _Sizes
    global_offsets: tuple[_Sizes, ...]
    local_offsets: tuple[_Sizes, ...]
    local_sizes: tuple[_Sizes, ...]

    def put_on(self, tensor: torch.Tensor) -> None:
        """Make a tensor one of these shards."""
        for name, value in zip(SHARD_ATTRIBUTES, self, strict=True):
            setattr(tensor, name, value)


def unnested(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return tensors and values by name, with each ShardedTensor of ShardedTensors as one.

    FSDP over tensor parallelism makes such. A name of which this rank has no shard is left out.
    """
    if not any(isinstance(tensor, ShardedTensorBase) for tensor in tensors.values()):
        return tensors
    return flatten_sharded_tensors(tensors)


def shard_attributes(tensor: torch.Tensor) -> ShardAttributes | None:
    """Return a tensor's attributes of ``CheckpointableTensor``; None where it lacks one of them."""
    if getattr(tensor, "global_shape", _MISSING) is _MISSING:
        return None
    found: list[Any] = [getattr(tensor, name, _MISSING) for name in SHARD_ATTRIBUTES]
    return None if any(value is _MISSING for value in found) else ShardAttributes(*found)


def contradiction(tensor: torch.Tensor) -> tuple[str, str] | None:
    """Say why what DCP would plan is not what a tensor holds, and the cure; None where both agree.

    Args:
        tensor: a tensor of any kind.
    """
    if isinstance(tensor, DTensor):
        return _of_dtensor(tensor)
    if isinstance(tensor, ShardedTensorBase):
        return _of_sharded(tensor)
    attributes = shard_attributes(tensor)
    return None if attributes is None else _of_attributes(tensor, attributes)


def _of_dtensor(tensor: DTensor) -> tuple[str, str] | None:
    mesh, placements, local = tensor.device_mesh, tensor.placements, local_tensor(tensor)
    if any(placement.is_partial() for placement in placements):
        return (
            f"has the placements {placements}, so that no rank has its values",
            "Reduce it first: redistribute it to Replicate() or Shard(), or call full_tensor()",
        )
    if shard_attributes(tensor) is not None:
        return "is a DTensor and has the attributes of a CheckpointableTensor", "Leave one of both out"
    if mesh.get_coordinate() is None or hasattr(local, "__create_write_items__"):
        return None  # DCP saves nothing of it here, or asks the local tensor what it holds
    expected = _expected(mesh, tuple(tensor.shape), placements)
    if expected is None:
        return (
            f"has the placements {placements}, by which the elements of this rank are no block of the whole",
            "Choose sizes that the mesh divides evenly, or redistribute it to Shard() or Replicate()",
        )
    if tuple(local.shape) != expected:
        whole = f"{tuple(tensor.shape)} placed by {placements} makes it {expected}"
        return (
            f"has a local tensor of shape {tuple(local.shape)}, and its global shape {whole}",
            "Pass the global shape and stride to DTensor.from_local, or use distribute_tensor",
        )
    return None


_known: weakref.WeakKeyDictionary[DeviceMesh, dict[Any, _Sizes | None]] = weakref.WeakKeyDictionary()
"""Local shapes by mesh, global shape and placements: a model has few, and each takes 0.1 ms."""


def _expected(mesh: DeviceMesh, shape: _Sizes, placements: tuple[Any, ...]) -> _Sizes | None:
    """Return the local shape of this rank; None where its elements are no block of the global tensor."""
    known = _known.setdefault(mesh, {})
    key = (shape, placements)
    if key not in known:
        block = not any(isinstance(one, StridedShard) for one in placements) or _is_block(
            mesh, shape, placements
        )
        local, _ = compute_local_shape_and_global_offset(shape, mesh, placements)
        known[key] = tuple(local) if block else None
    return known[key]


def _is_block(mesh: DeviceMesh, shape: _Sizes, placements: tuple[Any, ...]) -> bool:
    """Follow the placements, and see whether this rank's indices along every dimension are consecutive."""
    indices = [torch.arange(length) for length in shape]
    for at, size, placement in zip(mesh.get_coordinate() or (), mesh.shape, placements, strict=True):
        if isinstance(placement, StridedShard):
            before = indices[placement.dim]
            pieces = [_split(piece, size)[at] for piece in _split(before, int(placement.split_factor))]
            indices[placement.dim] = torch.cat(pieces)
        elif placement.is_shard():
            indices[placement.dim] = _split(indices[placement.dim], size)[at]
    return all(bool((one.diff() == 1).all()) for one in indices)


def _split(indices: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Split as ``torch.chunk`` does, with empty pieces at the end where there are too few."""
    size = -(-len(indices) // count)
    return [indices[number * size : (number + 1) * size] for number in range(count)]


def _of_sharded(tensor: ShardedTensorBase) -> tuple[str, str] | None:
    planned = [
        (tuple(one.shard_offsets), tuple(one.shard_sizes)) for one in tensor.metadata().shards_metadata
    ]
    for shard in tensor.local_shards():
        offsets, sizes = tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes)
        if tuple(shard.tensor.shape) != sizes:
            return (
                f"has a shard of shape {tuple(shard.tensor.shape)}, and its metadata says {sizes}",
                "Build the ShardedTensor from the shards that it has",
            )
        if (offsets, sizes) not in planned:
            return (
                f"has a shard of shape {sizes} at {offsets}, and its metadata names none there",
                "Build the ShardedTensor from the shards that it has",
            )
    return None


def _of_attributes(tensor: torch.Tensor, shards: ShardAttributes) -> tuple[str, str] | None:
    """Compare a ``CheckpointableTensor`` with its attributes, as torch 2.14 does while it plans."""
    if not PLANNED:
        reason = (
            f"has the attributes of a CheckpointableTensor, and torch {torch.__version__} would store "
            "its shard as the whole tensor"
        )
        return reason, "Upgrade to torch 2.14 or newer, or make a DTensor of it"
    cure = f"Set {', '.join(SHARD_ATTRIBUTES)} to what the tensor holds"
    try:
        whole, local = tuple(shards.global_shape), tuple(tensor.shape)
        boxes = list(zip(shards.global_offsets, shards.local_offsets, shards.local_sizes, strict=True))
        for offset, within, size in boxes:
            if not len(whole) == len(local) == len(offset) == len(within) == len(size):
                return f"has {len(local)} dimensions, and its shard attributes have others", cure
            if not _fits(offset, size, whole):
                return f"has a shard of shape {size} at {offset}, outside its global shape {whole}", cure
            if not _fits(within, size, local):
                return f"has a shard of shape {size} at {within} of its own, outside its shape {local}", cure
    except (TypeError, ValueError) as error:
        return f"has shard attributes that DCP can't plan from: {error}", cure
    return None


def _fits(offset: _Sizes, size: _Sizes, whole: _Sizes) -> bool:
    return all(o >= 0 and s >= 0 and o + s <= w for o, s, w in zip(offset, size, whole, strict=True))
