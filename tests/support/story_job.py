"""A training job for torchrun, as a user would write it: ``story_job.py URI STEPS``."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

import cloudckpt


def main(uri: str, steps: int) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Linear(672, 1024)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    with cloudckpt.Checkpointer(uri, keep_last=3, every_steps=10) as checkpointer:
        checkpointer.warmup(state)
        start = checkpointer.load(state) if checkpointer.latest_step() is not None else 0
        for step in range(start + 1, start + steps + 1):
            model(torch.rand(8, 672)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if not checkpointer.async_save(step, state).cancelled():
                checkpointer.wait()  # a step of this job is shorter than a save
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
