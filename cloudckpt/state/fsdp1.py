"""The state of optimizers of ``FullyShardedDataParallel``, which keeps parameters in flat ones."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)

from cloudckpt.backends.state.markers import OptimizerState, OwnNames
from cloudckpt.backends.torch_private import hybrid_sharding
from cloudckpt.state.optimizers import NamedOptimizer, is_alike

_COMPILED = "_orig_mod."
_HYBRID = hybrid_sharding()


def is_wrapped(module: nn.Module) -> bool:
    """Return whether a module, or one in it, is wrapped in ``FullyShardedDataParallel``."""
    return bool(FullyShardedDataParallel.fsdp_modules(module))


class ShardedOptimizer(NamedOptimizer):
    """An optimizer of flat parameters; FSDP names their parts, and shards them."""

    @functools.cached_property
    def _sharded(self) -> dict[str, Any]:
        with _sharded_types(self.module):
            state: dict[str, Any] = FullyShardedDataParallel.optim_state_dict(
                self.module, self.optimizer, dict(self.state), group=_group_of(self.module)
            )
        state["state"] = {name.replace(_COMPILED, ""): held for name, held in state["state"].items()}
        for group in state["param_groups"]:
            group["params"] = [name.replace(_COMPILED, "") for name in group["params"]]
        return state

    @functools.cached_property
    def _shards(self) -> dict[str, Any]:
        return get_model_state_dict(self.module)

    def ask(self) -> None:
        """Gather what names and shards need, which is a collective."""
        _ = self._sharded, self._shards

    def describe(self) -> OptimizerState:
        """Return the state of the optimizer by the names of its parameters."""
        groups = [{**group, "params": OwnNames(group["params"])} for group in self._own_groups()]
        return OptimizerState({"state": dict(self._sharded["state"]), "param_groups": groups})

    def names(self) -> Iterator[tuple[Any, list[str]]]:
        """Yield the name of each parameter, as a key and as its one name."""
        for group in self._own_groups():
            for name in group["params"]:
                yield name, [name]

    def blank(self, key: Any, part: str, entry: TensorStorageMetadata) -> torch.Tensor | None:
        """Make a tensor of the state to read into, sharded as its parameter is."""
        like = self._shards.get(key)
        if like is None or not is_alike(entry.size, like, part):
            return None
        return torch.empty_like(like, dtype=entry.properties.dtype)

    def _own_groups(self) -> Sequence[Mapping[str, Any]]:
        groups: Sequence[Mapping[str, Any]] = self._sharded["param_groups"]
        return groups

    def _load(self, loaded: dict[str, Any]) -> None:
        with _sharded_types(self.module):
            flat = FullyShardedDataParallel.optim_state_dict_to_load(
                self.module, self.optimizer, loaded, group=_group_of(self.module)
            )
        self.optimizer.load_state_dict(flat)


def _group_of(module: nn.Module) -> dist.ProcessGroup | None:
    wrapper = (
        module
        if isinstance(module, FullyShardedDataParallel)
        else FullyShardedDataParallel.fsdp_modules(module)[0]
    )
    group = None if wrapper.sharding_strategy in _HYBRID else wrapper.process_group
    return None if isinstance(group, tuple) else group


@contextlib.contextmanager
def _sharded_types(module: nn.Module) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP.state_dict_type", category=FutureWarning)
        with FullyShardedDataParallel.state_dict_type(
            module,
            StateDictType.SHARDED_STATE_DICT,
            ShardedStateDictConfig(),
            ShardedOptimStateDictConfig(),
        ):
            yield
