"""FSDP2: each rank saves the shards that it has. The run goes on with another number of ranks as well.

CHECKPOINT_URI=gs://bucket/run torchrun --standalone --nproc-per-node 2 examples/recipes/fsdp2.py --steps 1000
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import cloudckpt

BATCH = 32
"""Rows of one step, on all ranks together: what is learned doesn't depend on how many there are."""


def main() -> None:
    """Train from the newest committed step, or from the start, up to ``--steps``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="the last step of the run")
    parser.add_argument("--dropout", type=float, default=0.1)
    args = parser.parse_args()

    dist.init_process_group("gloo")  # "cpu:gloo,cuda:nccl" where there are GPUs
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)  # the same weights on every rank
    blocks = [block(args.dropout) for _ in range(4)]
    model = torch.nn.Sequential(*blocks, torch.nn.Linear(32, 1))
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh)
    torch.manual_seed(1 + dist.get_rank())  # dropout differs from rank to rank

    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100_000)
    batches = Batches()
    state = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "batches": batches,
        "random": RandomNumbers(),
    }

    with cloudckpt.Checkpointer(os.environ["CHECKPOINT_URI"], keep_last=3, every_steps=5) as checkpointer:
        start = checkpointer.load(state) if checkpointer.latest_step() is not None else 0
        say(f"from step {start}")
        for step in range(start + 1, args.steps + 1):
            rows = next(batches)
            loss = (model(rows) - rows.sum(dim=1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            checkpointer.async_save(step, state)
            mean = loss.detach()
            dist.all_reduce(mean)
            say(f"step {step} loss {mean.item() / dist.get_world_size()!r}")
    say("done")
    dist.destroy_process_group()


def block(dropout: float) -> torch.nn.Module:
    """Return a layer of the model, which FSDP gathers and frees as a whole."""
    return torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Dropout(dropout))


class Batches:
    """Stands for a dataloader with a state: its place in the data is the job's, and each rank takes its part.

    That is one value for all ranks, stored once. A loader whose ranks are at places of their own gives each
    a name of its own, such as ``{f"rank_{rank}": place}``, and then fits this number of ranks alone.
    """

    def __init__(self) -> None:
        self._drawn = 0

    def __next__(self) -> torch.Tensor:
        rows = torch.rand(BATCH, 32, generator=torch.Generator().manual_seed(self._drawn))
        self._drawn += 1
        return rows.tensor_split(dist.get_world_size())[dist.get_rank()]

    def state_dict(self) -> dict[str, Any]:
        """Return where it is."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._drawn = state["drawn"]


class RandomNumbers:
    """The generators of all ranks, as one list: another number of ranks can load it, and draws anew."""

    def state_dict(self) -> dict[str, Any]:
        """Gather them; every rank saves at the same step."""
        states: list[bytes] = [b""] * dist.get_world_size()
        dist.all_gather_object(states, torch.get_rng_state().numpy().tobytes())
        return {"ranks": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's, where the ranks are those that saved."""
        if len(state["ranks"]) == dist.get_world_size():
            mine = bytearray(state["ranks"][dist.get_rank()])
            torch.set_rng_state(torch.frombuffer(mine, dtype=torch.uint8))


def say(line: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
