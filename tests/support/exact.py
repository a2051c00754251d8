"""Equality of states to the bit: classes, order, dtypes and content; and a holder of any state."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import torch


class Holder:
    """An object whose state is anything."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        """Return the state."""
        return self.state

    def load_state_dict(self, state: Any) -> None:
        """Take a state."""
        self.state = state


def assert_same(one: Any, other: Any, at: str = "") -> None:
    """Assert that two states are the same.

    Args:
        one: what there is.
        other: what there should be.
        at: where in the states they are.
    """
    assert type(one) is type(other), f"{at}: {type(one)} and not {type(other)}"
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, f"{at}: {one} and not {other}"
        assert one.layout == other.layout, f"{at}: {one} and not {other}"
        same = torch.equal(
            one.detach().contiguous().view(-1).view(torch.uint8),
            other.detach().contiguous().view(-1).view(torch.uint8),
        )
        assert same, f"{at}: {one} and not {other}"
    elif isinstance(one, Mapping):
        assert [*one] == [*other], f"{at}: the keys {[*one]} and not {[*other]}"
        assert [*map(type, one)] == [*map(type, other)], f"{at}: keys of other classes"
        if isinstance(one, collections.defaultdict):
            assert one.default_factory is other.default_factory
        for key in one:
            assert_same(one[key], other[key], f"{at}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), f"{at}: {one} and not {other}"
        for index, (first, second) in enumerate(zip(one, other, strict=True)):
            assert_same(first, second, f"{at}[{index}]")
    else:
        assert repr(one) == repr(other), f"{at}: {one!r} and not {other!r}"
