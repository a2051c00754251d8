"""The size of a stored tensor, which explains itself to a state that it does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Self

import torch

from cloudckpt.backends.errors import ConfigurationError


class StoredSize(tuple[int, ...]):  # noqa: SLOT001 - a tuple of variable length takes no slots
    """Stands in for the ``torch.Size`` of a tensor's metadata during one load.

    DCP's planner compares sizes before the storage layer gets the state, and raises an error without
    URI or rank. The comparison that fails is the only place to say more.
    """

    fqn: str
    uri: str
    rank: int

    def __new__(cls, sizes: Iterable[int], fqn: str, uri: str, rank: int) -> Self:
        size = super().__new__(cls, sizes)
        size.fqn, size.uri, size.rank = fqn, uri, rank
        return size

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as a plain size, for callers that keep the metadata beyond the load."""
        return (torch.Size, (tuple(self),))

    def numel(self) -> int:
        """Return the number of elements, as ``torch.Size`` does."""
        return math.prod(self)

    def __ne__(self, other: object) -> bool:
        """Compare, and explain a difference.

        Raises:
            ConfigurationError: the sizes differ.
        """
        if tuple.__ne__(self, other):
            given = tuple(other) if isinstance(other, tuple) else other
            raise ConfigurationError(
                f"the tensor {self.fqn!r} has size {given} in the state and {tuple(self)} in the checkpoint",
                uri=self.uri,
                rank=self.rank,
                hint="Build the state that was saved, or leave this tensor out of it",
            )
        return False

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, other)

    __hash__ = tuple.__hash__
