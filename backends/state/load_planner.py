"""The planner of a load whose targets are chosen by what the checkpoint holds."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.tensor import DTensor

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.state import placements
from cloudckpt.backends.torch_private import local_tensor, spec_of


@dataclass(slots=True)
class Targets:
    """Tensors and values to read of a checkpoint."""

    tensors: dict[str, torch.Tensor | None] = field(default_factory=dict)
    """The tensor to read into, by name; None for a value."""
    blank: set[str] = field(default_factory=set)
    """Names of tensors that were made to be read into, so that what is read may take their place."""


class CheckpointLoadPlanner(DefaultLoadPlanner):
    """Reads into targets that are chosen when the metadata is known.

    Args:
        choose: returns the targets for a checkpoint's metadata.
    """

    def __init__(self, choose: Callable[[Metadata], Targets]) -> None:
        super().__init__(flatten_state_dict=False)
        self._choose = choose
        self._targets = Targets()
        self.loaded: dict[str, Any] = {}
        """Tensors and values that were read, by name."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],  # noqa: ARG002 - the targets stand for it
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Choose the targets."""
        if metadata is None:
            raise AssertionError("DCP gives a planner the metadata")
        self._targets = self._choose(metadata)
        self.loaded = dict(self._targets.tensors)
        self.state_dict = placements.unnested(dict(self._targets.tensors))
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Plan what this rank reads."""
        return create_default_local_load_plan(self.state_dict, self.metadata)  # type: ignore[arg-type]

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take a value that was proven to be safe."""
        self.take_value(read_item, torch.load(value, weights_only=False))

    def take_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> bool:
        """Take a tensor that was stored whole in place of one that was made to be read into."""
        name = read_item.dest_index.fqn
        target = self.loaded.get(name)
        if name not in self._targets.blank or not isinstance(target, torch.Tensor):
            return False
        local = local_tensor(target) if isinstance(target, DTensor) else target
        if tuple(tensor.shape) != tuple(local.shape) or tuple(read_item.lengths) != tuple(local.shape):
            raise ConfigurationError(
                f"{name!r} was saved as a {type(tensor).__name__} of shape {tuple(tensor.shape)}, which "
                f"can't be cut to {tuple(local.shape)}",
                hint="Load it on as many ranks as saved it",
            )
        on_device = tensor.to(local.device)
        if isinstance(target, DTensor):
            spec = spec_of(target)
            self.loaded[name] = DTensor(on_device, spec, requires_grad=False)  # type: ignore[no-untyped-call]
        else:
            self.loaded[name] = on_device
        return True

    def take_value(self, read_item: ReadItem, value: object) -> None:
        """Take a value that was loaded."""
        self.loaded[read_item.dest_index.fqn] = value
