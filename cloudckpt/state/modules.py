"""The state of modules, as DCP names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.state.markers import ModuleState, Rank0Only
from cloudckpt.backends.torch_private import names_of_parameter


def describe(module: nn.Module, name: str) -> ModuleState:
    """Return the state of a module, which FSDP, DDP and ``torch.compile`` may have wrapped.

    Args:
        module: whose state.
        name: of the module in the state.

    Raises:
        ConfigurationError: a tensor of it has no data.
    """
    state = ModuleState(with_data(module, name))
    for fqn, mine in _broadcast_buffers(module).items():
        if fqn in state:
            state[fqn] = Rank0Only(state[fqn], mine)
    return state


def unmarked(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a described module's tensors and extra state without their markers."""
    return {fqn: value.leaf if isinstance(value, Rank0Only) else value for fqn, value in state.items()}


def with_data(module: nn.Module, name: str) -> dict[str, Any]:
    """Return a module's tensors and extra state by name, all of which have data.

    Raises:
        ConfigurationError: a tensor of it has none.
    """
    for fqn, tensor in _tensors(module):
        if nn.parameter.is_lazy(tensor):
            raise ConfigurationError(
                f"{name!r} has the parameter {fqn!r}, which is not initialized",
                hint="Run the module once on an input, which gives its lazy parameters their shapes",
            )
        if tensor.is_meta:
            raise ConfigurationError(
                f"{name!r} has the tensor {fqn!r} on the meta device, which has no data",
                hint="Call module.to_empty(device=…) before a load, and initialize what the checkpoint "
                "does not hold, such as buffers that are not persistent",
            )
    return get_model_state_dict(module)


def restore(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a module the state that was loaded."""
    if state:
        set_model_state_dict(module, dict(state))


def names_of(module: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return the names of each parameter as DCP has them: more than one where a parameter is shared."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        for fqn in sorted(names_of_parameter(module, name)):
            held = names.setdefault(parameter, [])
            if fqn not in held:
                held.append(fqn)
    return names


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _broadcast_buffers(module: nn.Module) -> dict[str, bool]:
    """Return the buffers that DDP broadcasts from its first rank, and whether this rank is it."""
    found: dict[str, bool] = {}
    for prefix, wrapper in module.named_modules():
        if not isinstance(wrapper, DistributedDataParallel) or not wrapper.broadcast_buffers:
            continue
        mine = dist.get_rank(wrapper.process_group) == 0
        for name, _ in wrapper.named_buffers():
            if name.removeprefix("module.") not in wrapper.parameters_to_ignore:
                whole = f"{prefix}.{name}" if prefix else name
                found.update(dict.fromkeys(names_of_parameter(module, whole), mine))
    return found
