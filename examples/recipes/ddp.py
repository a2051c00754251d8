"""DDP: each rank has the whole model, and the checkpoint has it once.

CHECKPOINT_URI=s3://bucket/run torchrun --standalone --nproc-per-node 2 examples/recipes/ddp.py --steps 1000
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import cloudckpt


def main() -> None:
    """Train from the newest committed step, or from the start, up to ``--steps``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="the last step of the run")
    steps = parser.parse_args().steps

    dist.init_process_group("gloo")  # "cpu:gloo,cuda:nccl" where there are GPUs
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 1)))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100_000)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    with cloudckpt.Checkpointer(os.environ["CHECKPOINT_URI"], keep_last=3, every_steps=5) as checkpointer:
        start = checkpointer.load(state) if checkpointer.latest_step() is not None else 0
        say(f"from step {start}")
        for step in range(start + 1, steps + 1):
            loss = model(batch(step)).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            checkpointer.async_save(step, state)
            say(f"step {step} loss {loss.item()!r}")
    say("done")
    dist.destroy_process_group()


def batch(step: int) -> torch.Tensor:
    """Return this rank's data of one step, the same in every run of the job."""
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    return torch.rand(16, 32, generator=generator)


def say(line: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
