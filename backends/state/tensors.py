"""Tensors that can't be saved, or would not be loaded as they were: named before anything is saved.

| tensor | |
| --- | --- |
| strided, of every dtype that DCP plans, of any strides, conjugated or negated | restored |
| sparse COO, CSR, CSC, BSR, BSC; quantized per tensor or channel | restored |
| DTensor, ShardedTensor, ``CheckpointableTensor`` on torch 2.14 | restored, where the plan fits the memory |
| subclass: with classes registered as safe, into a tensor of its own class, or with trust | restored |
| parameter | its data; attributes and class are those of the one that it is loaded into |
| result of a collective under way | restored as the tensor that it waits for |
| meta, fake, functional, of ``torch.func``, uninitialized, nested, MKL-DNN | refused |
| dtypes of fewer bits than a byte | refused |
| ``Partial`` placements, local shapes unlike the plan, strided shards that are no block | refused |
| plain with Python attributes of its own | refused |
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.tensor import DTensor

from cloudckpt.backends.state import placements, proofs, subclasses
from cloudckpt.backends.torch_private import (
    AsyncCollectiveTensor,
    FakeTensor,
    FunctionalTensor,
    ShardedTensorBase,
    element_size,
    is_functional_tensor,
    is_functorch_wrapped_tensor,
    local_tensor,
)

_LAYOUTS = frozenset(
    {
        torch.strided,
        torch.sparse_coo,
        torch.sparse_csr,
        torch.sparse_csc,
        torch.sparse_bsr,
        torch.sparse_bsc,
    }
)


class Refusal(NamedTuple):
    """Why a tensor is not saved."""

    class_name: str
    reason: str
    """Continues a sentence whose subject is the tensor."""
    hint: str


def refusal(tensor: torch.Tensor, *, trust: bool = False, in_place: bool = False) -> Refusal | None:
    """Return why a load would not restore a tensor exactly; None where it does.

    Takes a microsecond for a plain tensor. A subclass is pickled without its data and loaded again.

    Args:
        tensor: a leaf of the state.
        trust: whether the checkpoint will be loaded with ``trust=True``.
        in_place: whether the state that it will be loaded into has a tensor of the same class.
    """
    if refused := unstorable(tensor):
        return refused
    kind = type(tensor)
    if kind is torch.nn.Parameter:
        return None  # loaded in place: what frameworks note on it stays
    if subclasses.is_plain(tensor):
        return _of_attributes(tensor)
    if isinstance(tensor, AsyncCollectiveTensor):
        return None  # saved as the tensor that it waits for
    if isinstance(tensor, DTensor):
        return refusal(local_tensor(tensor), trust=trust, in_place=in_place)
    if isinstance(tensor, ShardedTensorBase):
        found = (refusal(shard.tensor, trust=trust, in_place=in_place) for shard in tensor.local_shards())
        return next((one for one in found if one is not None), None)
    if hasattr(tensor, "__create_write_items__"):
        return None  # its class tells DCP which tensors to save
    return _refused(tensor, proofs.obstacle(tensor, trust=trust, in_place=in_place))


def unstorable(tensor: torch.Tensor) -> Refusal | None:
    """Return why a tensor has no values that can be stored; None where it has."""
    if isinstance(tensor, DTensor):
        return _refused(tensor, placements.contradiction(tensor)) or unstorable(local_tensor(tensor))
    if isinstance(tensor, ShardedTensorBase):
        if refused := _refused(tensor, placements.contradiction(tensor)):
            return refused
        found = (unstorable(shard.tensor) for shard in tensor.local_shards())
        return next((one for one in found if one is not None), None)
    return _refused(tensor, _without_values(tensor) or placements.contradiction(tensor))


def _refused(tensor: torch.Tensor, why: tuple[str, str] | None) -> Refusal | None:
    return None if why is None else Refusal(type(tensor).__name__, *why)


def _without_values(tensor: torch.Tensor) -> tuple[str, str] | None:
    if torch.nn.parameter.is_lazy(tensor):
        return "is not initialized", "Run the lazy module once before saving"
    if isinstance(tensor, (FakeTensor, FunctionalTensor)) or is_functional_tensor(tensor):
        return "stands for a tensor while a program is traced, and has no data", "Save outside of tracing"
    if is_functorch_wrapped_tensor(tensor):
        return "belongs to a transform of torch.func", "Save outside of vmap, grad and other transforms"
    if tensor.is_meta:
        return "is on the meta device and has no data", "Materialise it before saving, or leave it out"
    if tensor.is_nested:
        return "is a nested tensor, which DCP can't plan", "Save its values() and offsets(), or unbind() it"
    if tensor.layout not in _LAYOUTS:
        return f"has the layout {tensor.layout}, which torch.save does not write", "Save its to_dense()"
    if tensor.layout is not torch.strided and not _has_properties(tensor):
        return (
            f"has the layout {tensor.layout}, which DCP of torch {torch.__version__} can't plan",
            "Save its to_dense(), or its indices and values as tensors of their own",
        )
    if not _is_planned(tensor.dtype):
        return f"has the dtype {tensor.dtype}, which DCP can't plan", "Save a view of it as torch.uint8"
    return None


def _has_properties(tensor: torch.Tensor) -> bool:
    """Return False where DCP raises: torch 2.15 asks for strides, which compressed sparse tensors lack."""
    try:
        TensorProperties.create_from_tensor(tensor)
    except RuntimeError:
        return False
    return True


@functools.cache
def _is_planned(dtype: torch.dtype) -> bool:
    try:
        element_size(dtype)  # which DCP plans by
    except TypeError:
        return False
    return True


def _of_attributes(tensor: torch.Tensor) -> Refusal | None:
    """Refuse what users note on a plain tensor, which is stored without it."""
    noted = tensor.__dict__
    if not noted or "_is_buffer" in noted:  # torch.nn.Buffer's own
        return None
    lost = [name for name in noted if not name.startswith("_")]  # those of libraries, such as torch.compile
    if placements.shard_attributes(tensor) is not None:
        lost = [name for name in lost if name not in placements.SHARD_ATTRIBUTES]
    if not lost:
        return None
    return Refusal(
        type(tensor).__name__,
        f"has attributes that are not saved: {', '.join(lost)}",
        "Save them beside it as values of their own, and delete them from the tensor",
    )
