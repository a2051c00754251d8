"""torchtitan's loop, with a `CheckpointManager` that has cloudckpt behind it; the rest stays as it is there.

CHECKPOINT_URI=s3://bucket/run torchrun --standalone --nproc-per-node 2 examples/recipes/titan.py --steps 1000

Names and calls are those of torchtitan's ``components`` and ``trainer.py``, less what the loop does without.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard

import cloudckpt


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """The section ``[checkpoint]``. Its folder is a run's URI, and both async modes are one."""

    folder: str
    interval: int = 500
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "async_with_pinned_mem"
    keep_latest_k: int = 10
    load_step: int = -1


class CheckpointManager:
    """What takes the place of torchtitan's: `Trainer` calls it as it called that one."""

    def __init__(self, states: dict[str, Any], checkpoint_config: CheckpointConfig) -> None:
        self.states = states
        self.config = checkpoint_config
        self.checkpointer = cloudckpt.Checkpointer(
            checkpoint_config.folder,
            keep_last=checkpoint_config.keep_latest_k or None,
            every_steps=checkpoint_config.interval,
        )

    def load(self, step: int = -1) -> bool:
        """Load a step, by default the newest; False where none is committed yet."""
        if step == -1 and self.checkpointer.latest_step() is None:
            return False
        self.checkpointer.load(self.states, step=None if step == -1 else step)
        return True

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Save what is due. Called after each step: a job that is told to end saves at the next call."""
        if last_step:
            self.checkpointer.save(curr_step, self.states)
            return
        handle = self.checkpointer.async_save(curr_step, self.states)
        if self.config.async_mode == "disabled" and not handle.cancelled():
            handle.result()

    def maybe_wait_for_staging(self) -> None:
        """Return at once: `save` has returned when the state was copied."""

    def close(self) -> None:
        """Wait for the save under way, and end the checkpoint process."""
        self.checkpointer.close()


class ModelWrapper(Stateful):
    """The parts of the model that this rank has, such as stages of a pipeline."""

    def __init__(self, model: list[nn.Module]) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return {key: value for part in self.model for key, value in get_model_state_dict(part).items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part in self.model:
            set_model_state_dict(part, state_dict, options=StateDictOptions(strict=False))


class OptimizersContainer(torch.optim.Optimizer, Stateful):
    """An optimizer for each part of the model."""

    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def __init__(self, model_parts: list[nn.Module], **optimizer_kwargs: Any) -> None:
        self.model_parts = model_parts
        self.optimizers = [torch.optim.AdamW(part.parameters(), **optimizer_kwargs) for part in model_parts]
        super().__init__([one for part in model_parts for one in part.parameters()], optimizer_kwargs)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step(closure)

    def state_dict(self) -> dict[str, Any]:
        parts = zip(self.model_parts, self.optimizers, strict=True)
        states = [get_optimizer_state_dict(part, one, options=self.options) for part, one in parts]
        return {key: value for state in states for key, value in state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, one in zip(self.model_parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, one, state_dict, options=self.options)


class Trainer(Stateful):
    """The loop, and the step that it is at."""

    def __init__(self, steps: int, checkpoint_config: CheckpointConfig) -> None:
        self.step, self.steps = 0, steps
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(4)]
        model = nn.Sequential(*layers, nn.Linear(32, 1))
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
        self.model_parts: list[nn.Module] = [model]
        self.optimizers = OptimizersContainer(self.model_parts, lr=1e-3)
        self.config = checkpoint_config
        self.checkpointer = CheckpointManager(
            states={
                "model": ModelWrapper(self.model_parts),
                "optimizer": self.optimizers,
                "train_state": self,
            },
            checkpoint_config=checkpoint_config,
        )

    def train(self) -> None:
        """Train from the newest committed step, or from the start."""
        self.checkpointer.load(step=self.config.load_step)
        say(f"from step {self.step}")
        data_iterator = self.batch_generator()
        while self.step < self.steps:
            self.step += 1
            self.train_step(data_iterator)
            self.checkpointer.save(self.step, last_step=(self.step == self.steps))

    def train_step(self, data_iterator: Iterator[torch.Tensor]) -> None:
        """Learn from one batch."""
        self.optimizers.zero_grad()
        loss = self.model_parts[0](next(data_iterator)).square().mean()
        loss.backward()
        self.checkpointer.maybe_wait_for_staging()
        self.optimizers.step()
        say(f"step {self.step} loss {loss.item()!r}")

    def batch_generator(self) -> Iterator[torch.Tensor]:
        """Make this rank's data, beginning where the loop is."""
        while True:
            seed = self.step * dist.get_world_size() + dist.get_rank()
            yield torch.rand(16, 32, generator=torch.Generator().manual_seed(seed))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]

    def close(self) -> None:
        """End what works in the background."""
        self.checkpointer.close()


def say(line: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def main() -> None:
    """Train up to ``--steps``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="the last step of the run")
    steps = parser.parse_args().steps

    dist.init_process_group("gloo")  # "cpu:gloo,cuda:nccl" where there are GPUs
    trainer = Trainer(steps, CheckpointConfig(folder=os.environ["CHECKPOINT_URI"], interval=5))
    try:
        trainer.train()
    finally:
        trainer.close()
    say("done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
