"""Keys of dicts and elements of sets: only those whose hash and comparison run nothing of a user's."""

from __future__ import annotations

import collections
import enum
from collections.abc import Iterable
from typing import Any, Final

import torch

from cloudckpt.backends.state.codec.classes import kind_of, may_be_key
from cloudckpt.backends.state.codec.malformed import MalformedError

_IN_COMMON: Final = 64
"""Keys of one hash: each is compared with all before it. A dict of honest keys has a handful."""
_QUICK = frozenset({str, int, float, bool, bytes, type(None)})


def check_keys(keys: Iterable[Any]) -> None:
    """Check that hashing and comparing these runs nothing of a user's.

    Raises:
        MalformedError: a key is a tensor, which has no hash that lasts, or of a class with a hash of its own.
    """
    every = tuple(keys)
    for key in every:
        if type(key) not in _QUICK:
            _check(key)
    if len(every) > _IN_COMMON and max(collections.Counter(map(hash, every)).values()) > _IN_COMMON:
        raise MalformedError("too many of its keys have the same hash")


def _check(key: Any) -> None:
    if isinstance(key, tuple):
        check_keys(tuple.__iter__(key))
    elif isinstance(key, frozenset):
        check_keys(frozenset.__iter__(key))
    if isinstance(key, torch.Tensor):
        raise MalformedError("it has a tensor for a key")
    if (isinstance(key, enum.Enum) or kind_of(type(key)) is not None) and not may_be_key(key):
        raise MalformedError(f"it has a {type(key).__qualname__} for a key, whose hash is its own")
