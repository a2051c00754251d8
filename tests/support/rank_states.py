"""States of jobs of several ranks: trained, saved, and resumed by the ranks of a pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR

import cloudckpt


class Net(nn.Module):
    """Has a layer that is never used, and fewer rows than some jobs have ranks."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()
        self.second = nn.Linear(3, 1)
        self.unused = nn.Linear(2, 2)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.norm(self.first(batch)))
        return out


class Stage(nn.Module):
    """A stage of a pipeline, whose parameters no other rank has."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(rank)
        self.layers = nn.ModuleDict(
            {f"{rank}.{index}".replace(".", "_"): nn.Linear(5, 5) for index in range(2)}
        )

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            batch = layer(batch)
        return batch


def _fsdp2(rank: int) -> nn.Module:
    made = Net()
    fully_shard(made)
    return made


_CPU = torch.device("cpu")
KINDS: dict[str, Callable[[int], nn.Module]] = {
    "DDP": lambda _: DistributedDataParallel(Net(norm=True), find_unused_parameters=True),
    "FSDP2": _fsdp2,
    "FSDP1": lambda _: FullyShardedDataParallel(Net(), use_orig_params=True, device_id=_CPU),
    "FSDP1, flat": lambda _: FullyShardedDataParallel(Net(), use_orig_params=False, device_id=_CPU),
    "pipeline": Stage,
}


def make(kind: str, rank: int) -> dict[str, Any]:
    """Build what is trained: a module, an optimizer with an empty group, and a schedule."""
    module = KINDS[kind](rank)
    groups: list[dict[str, Any]] = [{"params": [*module.parameters()]}, {"params": [], "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    return {"module": module, "optimizers": [optimizer], "schedule": StepLR(optimizer, 2)}


def train(state: dict[str, Any], steps: range) -> list[float]:
    """Train for these steps, and return the losses of this rank."""
    optimizer: Optimizer = state["optimizers"][0]
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        loss = state["module"](torch.randn(4, 5, generator=generator)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state["schedule"].step()
        losses.append(loss.item())
    return losses


def resumed(rank: int, uri: str, kind: str, point: int) -> tuple[list[float], list[float], list[float]]:
    """Return the losses of an undisturbed run, of the run that saves, and of the one that resumes."""
    whole = train(make(kind, rank), range(5))
    with cloudckpt.Checkpointer(uri, progress=False) as checkpointer:
        state = make(kind, rank)
        first = train(state, range(point))
        checkpointer.save(point, state)
        going_on = first + train(state, range(point, 5))
        again = make(kind, rank)
        checkpointer.load(again)
        return whole, going_on, first + train(again, range(point, 5))


def save_own(rank: int, uri: str) -> None:
    """Save values that each rank has of its own."""
    with cloudckpt.Checkpointer(uri, progress=False) as checkpointer:
        torch.manual_seed(rank)
        checkpointer.save(1, own(rank, "error"))


def own(rank: int, on_resize: Any) -> dict[str, Any]:
    """Build a state of values of this rank."""
    return {
        "place": cloudckpt.PerRank({"batch": 10 * rank, "seen": torch.full((rank + 1,), rank)}, on_resize),
        "random": cloudckpt.PerRank(cloudckpt.RandomState(), "drop"),
        "step": 1,
    }


def last(values: list[Any], rank: int, world_size: int) -> Any:
    """Make a value of those of all ranks."""
    return {**values[-1], "batch": [value["batch"] for value in values], "of": (rank, world_size)}


def load_own(rank: int, uri: str, on_resize: Any) -> tuple[Any, list[int], float]:
    """Load them, and return a batch, what was seen, and the next random number."""
    state = own(7, on_resize)
    with cloudckpt.Checkpointer(uri, progress=False) as checkpointer:
        torch.manual_seed(100 + rank)
        checkpointer.load(state)
        place = state["place"].value
        return place["batch"], place["seen"].tolist(), torch.rand(1).item()


def refused(rank: int, uri: str, what: str) -> str:
    """Save what ranks have different ones of, and return the error."""
    states: dict[str, dict[str, Any]] = {
        "a value": {"epoch": 1, "place": {"batch": rank}},
        "a tensor": {"experts": torch.full((3,), float(rank))},
        "keys": {"seen": {f"id{rank}": 1}},
        "a buffer": {"module": Net(norm=True)},
        "random numbers": {"random": cloudckpt.RandomState()},
    }
    state = states[what]
    torch.manual_seed(rank)
    if what == "a buffer":
        state["module"](torch.randn(4, 5))
    with cloudckpt.Checkpointer(uri, progress=False) as checkpointer:
        try:
            checkpointer.save(1, state)
        except cloudckpt.ConfigurationError as error:
            return str(error)
        return ""
