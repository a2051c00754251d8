"""Train the GPT of model.py on a text with FSDP2, saving to an object store while training goes on.

Run it yourself, as often as you like; it resumes from the newest committed checkpoint:

    torchrun --standalone --nproc-per-node 2 examples/demo/train.py --uri file:///tmp/gpt --steps 20
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoints import child, committed_steps, step_name
from model import GPT, Shape
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import cloudckpt
from cloudckpt.executor import ProcessExecutor, SaveHandle

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


@dataclass(slots=True)
class _UnderWay:
    step: int
    handle: SaveHandle[Metadata]
    began: float
    meanwhile: int = 0  # steps that were done before it was


class BackgroundSaves:
    """Saves by the checkpoint processes, one at a time. One that fails is reported, and training goes on."""

    def __init__(self, executor: ProcessExecutor, state: TrainingState, uri: str) -> None:
        self._executor = executor
        self._state = state
        self._uri = uri
        self._save: _UnderWay | None = None
        self._generation: int | None = None

    def start(self) -> None:
        """Start the checkpoint processes, so that a network that they can't use shows before step 0."""
        self._executor.warmup()
        self._introduce()

    def begin(self) -> None:
        """Save to ``<uri>/step-<n>``; this waits for the save before, then no longer than a copy takes."""
        self.finish()
        step = self._state.step
        _say("saving", step)
        began = time.monotonic()
        writer = cloudckpt.StorageWriter(child(self._uri, step_name(step)))
        handle = self._executor.execute_save({"train": self._state}, storage_writer=writer)
        self._save = _UnderWay(step, handle, began)

    def look(self) -> None:
        """Tell what became of the save under way, if it is over; to be called after every step."""
        if self._save is None:
            return
        if self._save.handle.done():
            self._tell(self._save, waited=0)
        else:
            self._save.meanwhile += 1

    def finish(self) -> None:
        """Wait for the save under way, and tell what became of it."""
        if self._save is None:
            return
        began = time.monotonic()
        self._save.handle.exception()
        self._tell(self._save, waited=time.monotonic() - began)

    def _tell(self, save: _UnderWay, waited: float) -> None:
        self._save = None
        error = save.handle.exception()
        if error is not None:
            message = " ".join(str(error).split())
            _say_here("not-saved", dist.get_rank(), save.step, f"{type(error).__name__}:", message)
            return
        self._introduce()
        seconds = time.monotonic() - save.began
        _say("saved", save.step, f"{seconds:.2f}", "meanwhile", save.meanwhile, "waited", f"{waited:.2f}")

    def _introduce(self) -> None:
        """Tell of this rank's checkpoint process when it is a new one."""
        pid, generation = self._executor.pid, self._executor.generation
        if pid is not None and generation != self._generation:
            self._generation = generation
            _say_here("serves", dist.get_rank(), pid, "generation", generation)


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
    with ProcessExecutor() as executor:
        saves = BackgroundSaves(executor, state, uri)
        saves.start()
        resume(state, uri)
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
            saves.look()
            if state.step % every == 0:
                saves.begin()
        saves.finish()


def resume(state: TrainingState, uri: str) -> None:
    """Take over the newest committed checkpoint, where there is one."""
    if found := _from_rank_0(lambda: committed_steps(uri)):
        dcp.load({"train": state}, storage_reader=cloudckpt.StorageReader(child(uri, step_name(found[-1]))))
        _say("resumed", state.step)


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
        _say_here(*words)


def _say_here(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")  # at once, or the ranks' lines could mix
    sys.stdout.flush()


if __name__ == "__main__":
    main()
