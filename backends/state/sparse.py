"""The list that torch keeps of sparse tensors that were unpickled and not validated yet.

``torch.load`` validates and empties it where it succeeds. Other unpicklers, and loads that fail, leave their
tensors in it for as long as the process lives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from cloudckpt.backends.torch_private import unvalidated_sparse_tensors


def listed() -> list[Tensor]:
    """Return torch's own list."""
    return unvalidated_sparse_tensors()


@contextmanager
def unlisted() -> Iterator[None]:
    """Take off torch's list what the block has left on it."""
    try:
        yield
    finally:
        listed().clear()
