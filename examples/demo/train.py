"""Train the GPT of model.py on a text with FSDP2, saving to an object store as training goes on.

Run it yourself, as often as you like; it resumes from the newest committed checkpoint:

    torchrun --standalone --nproc-per-node 2 examples/demo/train.py --uri file:///tmp/gpt --steps 20
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoints import child, committed_steps, step_name
from model import GPT, Shape
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import cloudckpt

BATCH = 8
"""Sequences a rank in one step."""


class TrainingState:
    """Everything a run needs to go on as if nothing had happened: a ``Stateful`` for DCP."""

    def __init__(self, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """Shards of the model and of the optimizer, the step, and this rank's random numbers."""
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step, _rng(): torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.step = state["step"]
        torch.set_rng_state(state[_rng()])


def main() -> None:
    """Train from the newest committed checkpoint, or from the start, up to ``--steps``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--uri", required=True, help="where checkpoints go: s3://bucket/run, file:///folder")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[2] / "LICENSE")
    parser.add_argument("--steps", type=int, default=20, help="the last step of the run")
    parser.add_argument("--every", type=int, default=5, help="steps between saves")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    try:
        train(args.uri, _tokens(args.text), args.steps, args.every)
    finally:
        dist.destroy_process_group()


def train(uri: str, text: Tensor, steps: int, every: int) -> None:
    """Run the training loop on this rank, saving to ``<uri>/step-<n>`` every ``every`` steps."""
    torch.manual_seed(0)  # the same weights on every rank
    shape = Shape()
    model = GPT(shape)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    torch.manual_seed(1 + dist.get_rank())  # dropout differs from rank to rank

    state = TrainingState(model, optimizer)
    processes = _gather(os.getpid())
    _say("processes", *processes)
    if found := _from_rank_0(lambda: committed_steps(uri)):
        dcp.load({"train": state}, storage_reader=cloudckpt.StorageReader(child(uri, step_name(found[-1]))))
        _say("resumed", state.step)

    while state.step < steps:
        state.step += 1
        tokens, targets = _batch(text, state.step, shape.context)
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        _say("step", state.step, "loss", f"{mean.item() / dist.get_world_size():.9g}")
        if state.step % every == 0:
            save(state, child(uri, step_name(state.step)))


def save(state: TrainingState, uri: str) -> None:
    """Save to ``uri``; when this returns on any rank, the whole checkpoint is committed."""
    _say("saving", state.step)
    began = time.monotonic()
    dcp.save({"train": state}, storage_writer=cloudckpt.StorageWriter(uri))
    _say("saved", state.step, "seconds", f"{time.monotonic() - began:.2f}")


def _tokens(text: Path) -> Tensor:
    return torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()


def _batch(text: Tensor, step: int, context: int) -> tuple[Tensor, Tensor]:
    """Draw this rank's sequences of one step: they depend on the step and the rank, on nothing else."""
    draw = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    starts = torch.randint(len(text) - context, (BATCH,), generator=draw)
    windows = text[starts[:, None] + torch.arange(context + 1)]
    return windows[:, :-1], windows[:, 1:]


def _rng() -> str:
    return f"rng_{dist.get_rank()}"  # one key a rank: DCP takes a plain tensor under one key for a replica


def _gather(value: int) -> list[int]:
    values = [0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _from_rank_0(ask: Callable[[], list[int]]) -> list[int]:
    """Let one rank look, so that all ranks go by the same answer."""
    answer = [ask() if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(answer)
    return answer[0]


def _say(*words: object) -> None:
    if dist.get_rank() == 0:
        sys.stdout.write(" ".join(map(str, words)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
