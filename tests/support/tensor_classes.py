"""Tensor subclasses of the tests, in a module that a checkpoint process can import."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Measured(Tensor):
    """A tensor with a unit: memory of its own, and an attribute."""

    unit: str


class Eager(Tensor):
    """A wrapper subclass whose ``__setstate__`` tells that it was called, and which knows few operators."""

    awoken = 0

    @staticmethod
    def __new__(cls: Any, inner: Tensor, scale: float) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor, scale: float) -> None:
        self.held = inner
        self.scale = scale

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        return ["held"], self.scale

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], scale: float, *_: object) -> Eager:
        return cls(parts["held"], scale)

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).awoken += 1
        for name, value in state.items():
            setattr(self, name, value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.is_pinned.default:
            return False
        raise NotImplementedError(f"{cls.__name__} has no {func}")


class Bare(Eager):
    """Knows not even what DCP asks while it plans."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{cls.__name__} has no {func}")


def measured(values: Tensor, unit: str) -> Measured:
    """Return a tensor with a unit."""
    tensor = values.as_subclass(Measured)
    tensor.unit = unit
    return tensor
