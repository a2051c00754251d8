"""Accelerate: a loop of one's own, whose prepared parts are saved in the background.

CHECKPOINT_URI=s3://bucket/run torchrun --standalone --nproc-per-node 2 examples/recipes/accelerate_loop.py
"""

from __future__ import annotations

import argparse
import os
import random
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, Dataset

import cloudckpt


class RandomState:
    """What dropout and the like draw from, on one rank."""

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return {"states": (random.getstate(), torch.get_rng_state(), cuda)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        python, cpu, cuda = state["states"]
        random.setstate(python)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


class Samples(Dataset[torch.Tensor]):
    """Made up, each by its index."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(32, generator=torch.Generator().manual_seed(index))


def main() -> None:
    """Train from the newest committed step, or from the start, up to ``--steps``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="the last step of the run")
    steps = parser.parse_args().steps

    # Shuffled by seed and epoch, so that the order is the same however often the run was started.
    data = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
    accelerator = Accelerator(cpu=True, dataloader_config=data)
    set_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100_000)
    # Its generator seeds workers, at each epoch; without one that is drawn from what dropout draws from.
    loader = DataLoader(Samples(), batch_size=8, shuffle=True, generator=torch.Generator())
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    state = {
        "model": model,
        "optimizer": optimizer.optimizer,
        "scheduler": scheduler,
        f"random-{accelerator.process_index}": RandomState(),
    }
    if accelerator.scaler is not None:  # of fp16
        state["scaler"] = accelerator.scaler

    with cloudckpt.Checkpointer(os.environ["CHECKPOINT_URI"], keep_last=3, every_steps=5) as checkpointer:
        step = checkpointer.load(state) if checkpointer.latest_step() is not None else 0
        accelerator.print(f"from step {step}", flush=True)
        while step < steps:
            epoch, taken = divmod(step, len(loader))
            loader.set_epoch(epoch)
            for batch in accelerator.skip_first_batches(loader, taken):
                loss = model(batch).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                step += 1
                checkpointer.async_save(step, state)
                accelerator.print(f"step {step} loss {loss.item()!r}", flush=True)
                if step == steps:
                    break
    accelerator.print("done", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
