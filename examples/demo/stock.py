"""Reading a checkpoint twice, with stock DCP and with cloudckpt, to compare the two."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, StorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cloudckpt.backends.config.target import Target

# torch 2.15 made the module public.
_NAMES = ("fsspec_filesystem", "_fsspec_filesystem")
_FOUND = next(one for one in _NAMES if importlib.util.find_spec(f"torch.distributed.checkpoint.{one}"))
_module: Any = importlib.import_module(f"torch.distributed.checkpoint.{_FOUND}")
FsspecReader: Callable[..., StorageReader] = _module.FsspecReader


def stock_reader(target: Target) -> StorageReader:
    """Return PyTorch's own reader of a folder or of a bucket."""
    if target.protocol == "file":
        return FileSystemReader(target.path)
    options = target.options
    if target.protocol == "gs":
        # As cloudckpt does: to a server without encryption no credentials go.
        anonymous = options.anon or (options.endpoint_url or "").startswith("http://")
        chosen = {"token": "anon"} if anonymous else {}
        if options.project:
            chosen["project"] = options.project
        return FsspecReader(target.uri, endpoint_url=options.endpoint_url, **chosen)
    client = {"region_name": options.region} if options.region else {}
    return FsspecReader(
        target.uri,
        endpoint_url=options.endpoint_url,
        profile=options.profile,
        anon=options.anon,
        requester_pays=options.requester_pays,
        client_kwargs=client,
    )


def load_everything(reader: StorageReader) -> dict[str, Any]:
    """Load every value of a checkpoint whole, in this one process, under its flat name."""
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.zeros(kind.size, dtype=kind.properties.dtype)
        if isinstance(kind, TensorStorageMetadata)
        else None
        for name, kind in stored.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Name the values that are not the same, bit for bit."""
    names = sorted(one.keys() | other.keys())
    return [name for name in names if not _same(one.get(name), other.get(name))]


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))
    return type(one) is type(other) and one == other


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
