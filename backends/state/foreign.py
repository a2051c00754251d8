"""Tensors and numpy's objects inside values: which are restored exactly."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from cloudckpt.backends.state.codec import arrays

_APART = "Put it into a dict or a list, where tensors are saved one by one"


@dataclass(frozen=True, slots=True)
class Finding:
    """Verdict on a tensor, an array, a scalar or a dtype."""

    reason: str | None = None
    """Why it would not be restored exactly; None where it would."""
    hint: str | None = None
    lossy: bool = False
    """Pickling it succeeds, and changes it."""
    parts: Iterable[tuple[str, object]] = ()
    """Objects that it holds, by their paths in it."""


def foreign_problem(value: Any) -> Finding | None:
    """Return what is known of an object of torch's or numpy's, or None where it is neither."""
    if isinstance(value, torch.Tensor):
        return _of_tensor(value)
    np: Any = sys.modules.get("numpy")  # without it no object is numpy's
    if np is None:
        return None
    if isinstance(value, np.ndarray):
        if type(value) is not np.ndarray:
            return Finding("its class is one of its own, for an array", "Save numpy.array(value)")
        problem = arrays.problem_of_array(value)
        if problem is None and value.dtype.hasobject:
            return Finding(parts=((str(list(at)), value[at]) for at in np.ndindex(value.shape)))
        if problem is None and value.nbytes > arrays.LARGEST:
            return Finding("it is larger than a pickle can have", "Save torch.from_numpy(value)")
        return Finding(problem, lossy=value.dtype.metadata is not None or not value.dtype.isnative)
    if isinstance(value, np.dtype):
        return Finding(problem := arrays.problem_of_dtype(value), lossy=problem is not None)
    if isinstance(value, np.generic) and type(value).__module__ == "numpy":
        return Finding(problem := arrays.problem_of_scalar(value), lossy=problem is not None)
    return None


def _of_tensor(tensor: torch.Tensor) -> Finding:
    if _is_sharded(tensor):
        return Finding("it is a part of a tensor of all ranks, inside a value", _APART, lossy=True)
    if tensor.is_meta:
        return Finding(
            "it is on the meta device, without data", "Materialize it with to_empty() first", lossy=True
        )
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return Finding("it is a tensor of another class, inside a value", _APART)
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return Finding("it is a sparse, nested or quantized tensor, inside a value", _APART)
    if not tensor.is_leaf:
        return Finding("it has a gradient function, which is not saved", "Save tensor.detach()", lossy=True)
    if vars(tensor):
        hint = "Save tensor.detach(), and its attributes beside it"
        return Finding("it has attributes, which are not saved", hint, lossy=True)
    return Finding()


def _is_sharded(tensor: torch.Tensor) -> bool:
    """Return True if a value that holds the tensor would hold one rank's part alone."""
    kinds = (
        ("torch.distributed.tensor", "DTensor"),
        ("torch.distributed._shard.sharded_tensor", "ShardedTensor"),
    )
    found = [getattr(sys.modules.get(module), name, None) for module, name in kinds]
    return any(isinstance(kind, type) and isinstance(tensor, kind) for kind in found)
