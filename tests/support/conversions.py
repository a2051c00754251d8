"""What others make of what was converted."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def from_checkpoint(reader: StorageReader) -> dict[str, Any]:
    """The nested state of a checkpoint, as DCP's own tools load it."""
    found: dict[str, Any] = {}
    planner: Any = _EmptyStateDictLoadPlanner
    _load_state_dict(found, storage_reader=reader, planner=planner(), no_dist=True)
    return found


def by_name(state: dict[str, Any]) -> dict[str, Any]:
    """A flat state in the order of its names: safetensors have one of their own."""
    return dict(sorted(state.items()))
