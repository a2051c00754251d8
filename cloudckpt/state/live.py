"""Objects of a state that are asked for their own: modules, optimizers, and what has a state_dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from cloudckpt.backends.torch_private import ShardedTensor
from cloudckpt.state.per_rank import PerRank

_NEVER = frozenset(
    {torch.Tensor, nn.Parameter, dict, list, tuple, str, int, float, bool, bytes, complex, type(None)}
)
"""Classes whose instances need no closer look: asking a protocol is slow."""

DEEPEST = 200
"""Containers within one another; DCP's own traversal and Python's pickle go no deeper than about 300."""


@dataclass(frozen=True, slots=True)
class Found:
    """A live object, and its name: the keys and indices that lead to it, joined by dots."""

    name: str
    value: Any


def is_module(value: object) -> bool:
    """Return whether a value is a module whose state DCP asks for."""
    return _is_plain(value, nn.Module)


def is_optimizer(value: object) -> bool:
    """Return whether a value is an optimizer whose state DCP asks for."""
    return _is_plain(value, Optimizer)


def is_live(value: object) -> bool:
    """Return whether a value is asked for its state, instead of being one."""
    if type(value) in _NEVER or isinstance(value, torch.Tensor):
        return False
    return isinstance(value, nn.Module | Optimizer | PerRank | Stateful)


def is_meta(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has no data; a ShardedTensor of no local shard can't be asked."""
    return not isinstance(tensor, ShardedTensor) and tensor.is_meta


def joined(name: str, key: object) -> str:
    """Return the name of what is at a key or index of a container."""
    return f"{name}.{key}" if name else str(key)


def find(value: Any, name: str = "", depth: int = 0) -> Iterator[Found]:
    """Yield every live object in nested dicts, lists and tuples, those in a `PerRank` included.

    In an order that is the same on all ranks, regardless of the order of their keys: what the objects do may
    be a collective.
    """
    if is_live(value):
        yield Found(name, value)
        if isinstance(value, PerRank):
            yield from find(value.value, name, depth + 1)
    elif depth > DEEPEST:
        return
    elif isinstance(value, Mapping):
        for key, inner in sorted(value.items(), key=lambda item: str(item[0])):
            if type(inner) not in _LEAVES:
                yield from find(inner, joined(name, key), depth + 1)
    elif type(value) in (list, tuple):
        for index, inner in enumerate(value):
            if type(inner) not in _LEAVES:
                yield from find(inner, joined(name, index), depth + 1)


_LEAVES = _NEVER - {dict, list, tuple}


def _is_plain(value: object, kind: type) -> bool:
    """Return whether a value is of a class that leaves it to others what its state is.

    ``isinstance`` can't tell: for DCP's protocol all that has the two methods is ``Stateful``.
    """
    return isinstance(value, kind) and Stateful not in type(value).__mro__
