"""The planner of a load whose targets are chosen by what the checkpoint holds."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint._sharded_tensor_utils import _flatten_sharded_tensors
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

Targets = Mapping[str, torch.Tensor | None]
"""What to read, by name: the tensor to read into, or None for a value."""


class CheckpointLoadPlanner(DefaultLoadPlanner):
    """Reads into targets that are chosen when the metadata is known.

    Args:
        choose: returns the targets for a checkpoint's metadata.
    """

    def __init__(self, choose: Callable[[Metadata], Targets]) -> None:
        super().__init__(flatten_state_dict=False)
        self._choose = choose
        self.loaded: dict[str, Any] = {}
        """What was read, by name."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],  # noqa: ARG002 - the targets stand for it
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Choose the targets."""
        if metadata is None:
            raise AssertionError("DCP gives a planner the metadata")
        targets: dict[str, Any] = dict(self._choose(metadata))
        self.loaded = dict(targets)
        if any(isinstance(target, ShardedTensor) for target in targets.values()):
            targets = _flatten_sharded_tensors(targets)
        self.state_dict = targets
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Plan what this rank reads."""
        if self.metadata is None:
            raise AssertionError("the planner was not set up")
        return create_default_local_load_plan(self.state_dict, self.metadata)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take a value that was proven to be safe."""
        self.take_value(read_item, torch.load(value, weights_only=False))

    def take_value(self, read_item: ReadItem, value: object) -> None:
        """Take a value that was loaded."""
        self.loaded[read_item.dest_index.fqn] = value
