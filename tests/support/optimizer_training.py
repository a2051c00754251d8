"""Training of a tiny model with an optimizer of the matrix, alike however often and wherever it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer

from support.optimizers import LR, Combination, Container, Groups, Shape

AFTER = 3
"""Steps that a run goes on for after it was saved or loaded."""
WARM_UP = 1000
"""The batch of a pass that is no step."""


class Model(nn.Module):
    """A layer that learns, and others beside it to be frozen or left unused."""

    def __init__(self, shape: Shape, event: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shape = shape
        self.body = self._layer(bias=shape.bias)
        self.head: nn.Module = (
            nn.Embedding(shape.heads, shape.outputs, sparse=True)
            if shape.sparse
            else nn.Linear(shape.outputs, shape.heads, bias=False)
        )
        self.late = self.fixed = self.idle = self.never = None
        if event == "frozen":
            self.fixed, self.late = self._layer(), self._layer()
        if event == "unused":
            self.idle, self.never = self._layer(), self._layer()
            self.nothing = nn.Parameter(torch.empty(0, shape.inputs))

    def _layer(self, *, bias: bool = False) -> nn.Module:
        if self.shape.sparse:
            return nn.Embedding(self.shape.inputs, self.shape.outputs, sparse=True)
        return nn.Linear(self.shape.inputs, self.shape.outputs, bias=bias)

    def forward(self, batch: Tensor, *, idle: bool) -> Tensor:
        sparse = self.shape.sparse
        given = batch.argsort(dim=1)[:, :2].flatten() if sparse else batch
        layers = [self.body, self.late, self.fixed, self.idle if idle else None]
        hidden = torch.stack([layer(given) for layer in layers if layer is not None]).sum(dim=0).tanh()
        out = hidden @ self.head(torch.zeros(1, dtype=torch.int64)).t() if sparse else self.head(hidden)
        loss: Tensor = (out - 1).square().mean()
        return loss


class Run:
    """A run of one combination: fresh, or gone on with.

    Args:
        mesh: the ranks over which FSDP2 shards; None for a process alone.
    """

    def __init__(self, combination: Combination, mesh: DeviceMesh | None) -> None:
        self.point, self.event = combination.point, combination.event
        self.model = Model(combination.kind.shape, self.event)
        if self.model.fixed is not None:
            self.model.fixed.requires_grad_(False)
        if mesh is not None:
            fully_shard(self.model, mesh=mesh)
        self.optimizer = combination.kind.make(self._groups())
        self.losses: list[float] = []

    def _groups(self) -> Groups:
        groups: Groups = [{"params": list(self.model.parameters()), "initial_lr": LR}]
        if self.event == "empty group":
            return [{"params": [], "lr": LR / 2}, *groups, {"params": [], "initial_lr": LR / 4}]
        return groups

    def train(self, start: int, steps: int) -> None:
        """Take steps from one number on: all that a step does follows from its number."""
        for at in range(start, start + steps):
            self.arrange(at)
            self._step(at)
            for group in self.optimizer.param_groups:  # in place where it is a tensor
                group["lr"] *= 0.875
            if self.event != "gradients":
                self.optimizer.zero_grad()

    def arrange(self, at: int) -> None:
        """Freeze what is trained for two steps at most, and thaw it one step after the run is saved."""
        if self.model.late is None:
            return
        thawed = not min(2, self.point) <= at <= self.point
        if isinstance(self.model, FSDPModule):  # FSDP2 keeps the whole parameters of the first step
            self.model.unshard()
            self.model.late.requires_grad_(thawed)
            self.model.reshard()
        self.model.late.requires_grad_(thawed)

    def warm_up(self) -> None:
        """Have gradients, and take no step."""
        torch.autograd.backward(self._loss(WARM_UP))

    def _step(self, at: int) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self._loss(at)
            torch.autograd.backward(loss)
            return _mean_of_ranks(loss) if isinstance(self.optimizer, LBFGS) else loss

        if isinstance(self.optimizer, LBFGS):
            loss = self.optimizer.step(closure)  # type: ignore[no-untyped-call]
        else:
            loss = closure()
            self.optimizer.step()
        self.losses.append(float(loss))

    def _loss(self, at: int) -> Tensor:
        rank = dist.get_rank() if dist.is_initialized() else 0
        batch = torch.rand(4, self.model.shape.inputs, generator=torch.Generator().manual_seed(2 * at + rank))
        loss: Tensor = self.model(batch, idle=at > self.point)
        return loss

    def described(self) -> dict[str, Any]:
        """Return parameters, the optimizer's state and its groups, with a digest for each tensor."""
        optimizers = self.optimizer.parts if isinstance(self.optimizer, Container) else {"": self.optimizer}
        return {
            "model": {name: digest(one) for name, one in self.model.named_parameters()},
            "optimizer": {name: self._described(one) for name, one in optimizers.items()},
        }

    def _described(self, optimizer: Optimizer) -> dict[str, Any]:
        names: dict[Tensor, str] = {one: name for name, one in self.model.named_parameters()}
        keys = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        states = {names[one]: digest(dict(state)) for one, state in optimizer.state.items() if state}
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        return {
            "state": {key: states[key] for key in keys if key in states},
            "groups": [dict(sorted(digest(group).items())) for group in groups],
        }

    def beside(self) -> dict[str, Any]:
        """Return what neither saving nor loading may change: gradients, and random numbers."""
        gradients = {name: digest(one.grad) for name, one in self.model.named_parameters()}
        return {"gradients": gradients, "random": digest(torch.get_rng_state())}


def _mean_of_ranks(loss: Tensor) -> Tensor:
    """Return the loss of all ranks, which LBFGS decides by and keeps: it must be one for all of them."""
    if not dist.is_initialized():
        return loss
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return mean


def digest(value: Any) -> Any:
    """Return a value, with text in place of each tensor: its class, layout, and a digest of its bytes."""
    if isinstance(value, DTensor):
        return f"DTensor {tuple(value.shape)} {value.placements} of {digest(value.to_local())}"
    if isinstance(value, Tensor) and value.is_sparse:
        return f"sparse {digest(value.to_dense())}"
    flatten = getattr(value, "__tensor_flatten__", None)
    if isinstance(value, Tensor) and flatten is not None:  # a subclass
        names, context = flatten()
        parts = {name: digest(getattr(value, name)) for name in names}
        return f"{type(value).__name__} {tuple(value.shape)} {value.dtype} {context} {parts}"
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        head = f"{type(value).__name__} {value.dtype} {tuple(value.shape)}"
        return f"{head} {hashlib.sha256(data).hexdigest()[:16]}"
    if isinstance(value, Mapping):
        return {key: digest(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(digest(inner) for inner in value)
    return value
