"""Pickling a DCP ``Metadata``: the bytes that ``pickle.dumps`` makes, in two thirds of the time.

A large one is little but items and chunks of tensors. How such an object is taken apart is looked up for each
of them where the pickler does not know it; here it does.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties

from cloudckpt.backends.torch_private import StorageInfo

_NEW: Final[Callable[..., Any]] = copyreg.__newobj__  # type: ignore[attr-defined]  # typeshed lacks it


def dumps(what: object) -> bytes:
    """Return the same as ``pickle.dumps``."""
    sink = io.BytesIO()
    pickler = pickle.Pickler(sink)
    pickler.dispatch_table = {**copyreg.dispatch_table, **_REDUCERS}
    pickler.dump(what)
    return sink.getvalue()


def _plain(one: object) -> tuple[Any, ...]:
    return _NEW, (type(one),), one.__dict__


def _info(one: StorageInfo) -> tuple[Any, ...]:
    state = one.__dict__
    if "transform_descriptors" in state:  # None, most likely, which it leaves out; else it need not be asked
        state = one.__getstate__()  # type: ignore[no-untyped-call]
    return _NEW, (type(one),), state


_PROPERTIES: Final = 5
"""Fields of `TensorProperties` before torch 2.15, which adds the strides. Older releases refuse a sixth."""


def _properties(one: TensorProperties) -> tuple[Any, ...]:
    state: tuple[Any, ...] = one.__getstate__()  # type: ignore[no-untyped-call]
    return _NEW, (type(one),), state[:_PROPERTIES]


def _size(one: torch.Size) -> tuple[Any, ...]:
    return torch.Size, ((*one,),)


_REDUCERS: Final[dict[type, Callable[[Any], Any]]] = {
    StorageInfo: _info,
    MetadataIndex: _plain,
    TensorProperties: _properties,
    ChunkStorageMetadata: _plain,
    torch.Size: _size,
}
