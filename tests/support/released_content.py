"""The parts that states of released checkpoints are made of: content, and objects that hold it.

Every byte follows from a name by SHAKE-256, so that another machine builds the same state years later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

State = dict[str, Any]

UNSET = "not loaded"
"""What a blank state holds where a plain value belongs."""
STEPS = 5
"""Steps that an optimizer or a scheduler has counted."""


class Content:
    """What a state is made of: what a checkpoint holds, or nothing, to load into.

    Args:
        blank: make zeros, and ``UNSET`` for each plain value.
    """

    def __init__(self, *, blank: bool) -> None:
        self.blank = blank

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return bits that ``name`` decides, NaNs and all."""
        size = torch.Size(shape)
        if self.blank or size.numel() == 0:
            return torch.zeros(size, dtype=dtype)
        data = bytearray(hashlib.shake_256(name.encode()).digest(size.numel() * dtype.itemsize))
        if dtype is torch.bool:
            data = bytearray(byte & 1 for byte in data)
        return torch.frombuffer(data, dtype=dtype).reshape(size)

    def value(self, value: Any) -> Any:
        """Return a plain value."""
        return UNSET if self.blank else value

    def values(self, values: Mapping[str, Any]) -> State:
        """Return plain values under their keys."""
        return {key: self.value(value) for key, value in values.items()}

    def put(self, tensor: Tensor, name: str) -> None:
        """Write to a tensor, or to this rank's part of one, what ``name`` decides."""
        # Finite numbers: this release computes with parameters while it loads, which quiets a signalling NaN.
        whole = self.tensor(name, tensor.shape, torch.int8).to(tensor.dtype)
        if isinstance(tensor, DTensor):
            part = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.to_local().detach().copy_(part.to_local())
        else:
            tensor.detach().copy_(whole)

    def train(self, name: str, model: nn.Module, *optimizers: Optimizer) -> None:
        """Give parameters, buffers and the state of optimizers their content; to a blank one, no state."""
        for key, buffer in model.named_buffers():
            self.put(buffer, f"{name}.buffers.{key}")
        if not self.blank:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for key, parameter in model.named_parameters():
            self.put(parameter, f"{name}.{key}")
            for state in (one.state[parameter] for one in optimizers if parameter in one.state):
                for kind, tensor in state.items():
                    if kind == "step":
                        tensor.fill_(STEPS)
                    else:
                        self.put(tensor, f"{name}.{key}.{kind}")

    def lr(self, of_the_run: float) -> float:
        """Return a learning rate, or the one that a script begins with."""
        return 1.0 if self.blank else of_the_run

    def advance(self, scheduler: LRScheduler | ReduceLROnPlateau, **more: Any) -> Any:
        """Have a scheduler say that it has taken steps, without computing what lr they lead to."""
        if not self.blank:
            at = {"last_epoch": STEPS, "_last_lr": [0.125], **more}
            scheduler.load_state_dict({**scheduler.state_dict(), **at})
        return scheduler


class Held:
    """An object of a script, of which a checkpoint sees its ``state_dict`` alone."""

    def __init__(self, state: State) -> None:
        self.state = state

    def state_dict(self) -> State:
        return dict(self.state)

    def load_state_dict(self, state: State) -> None:
        self.state = dict(state)


class TrainingState:
    """The demo's: model, optimizer, step and random numbers in one object."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, **more: Any) -> None:
        self._model, self._optimizer, self._more = model, optimizer, more

    def state_dict(self) -> State:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer, **self._more}

    def load_state_dict(self, state: State) -> None:
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self._model, self._optimizer, **parts)
        self._more = {key: state[key] for key in self._more}


class TitanModel(Stateful):
    """torchtitan's ``ModelWrapper``."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self._parts = parts

    def state_dict(self) -> State:
        return {key: value for part in self._parts for key, value in get_model_state_dict(part).items()}

    def load_state_dict(self, state_dict: State) -> None:
        for part in self._parts:
            set_model_state_dict(part, state_dict, options=StateDictOptions(strict=False))


class TitanOptimizers(Optimizer, Stateful):
    """torchtitan's ``OptimizersContainer``."""

    _options = StateDictOptions(flatten_optimizer_state_dict=True)

    def __init__(self, parts: list[nn.Module], lr: float) -> None:
        self._parts = parts
        self.optimizers = [AdamW(part.parameters(), lr=lr) for part in parts]
        super().__init__([one for part in parts for one in part.parameters()], {"lr": lr})

    def state_dict(self) -> State:
        pairs = zip(self._parts, self.optimizers, strict=True)
        states = [get_optimizer_state_dict(part, one, options=self._options) for part, one in pairs]
        return {key: value for state in states for key, value in state.items()}

    def load_state_dict(self, state_dict: State) -> None:
        for part, one in zip(self._parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, one, state_dict, options=self._options)


def described(value: Any) -> Any:
    """Return what a state holds as dicts, lists, tensors and values, to be compared."""
    if isinstance(value, Mapping):
        return {key: described(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [described(inner) for inner in value]
    if isinstance(value, nn.Module):
        return {**dict(value.named_parameters()), **dict(value.named_buffers())}
    if isinstance(value, TitanOptimizers):
        return [described(one) for one in value.optimizers]
    if isinstance(value, Optimizer):
        groups = [{k: v for k, v in group.items() if k != "params"} for group in value.param_groups]
        parameters = [one for group in value.param_groups for one in group["params"]]
        return {"state": [dict(value.state.get(one, {})) for one in parameters], "groups": groups}
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, tuple):
        return tuple(described(inner) for inner in value)
    if isinstance(value, Stateful):  # by its methods: DCP's protocol
        return described(value.state_dict())
    return value
