"""What `torch.save` and `torch.load` did, done by a Checkpointer. A run that has an old file goes on from it.

CHECKPOINT_URI=s3://bucket/run python examples/recipes/replace_torch_save.py --legacy last.pt --steps 1000

Before, the loop held this, which blocks training for the whole upload, and a kill halfway leaves half a file:

    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(), "step": step, "rng": torch.get_rng_state()}, "last.pt")
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

import cloudckpt


def main() -> None:
    """Train from the newest committed step, from the old file, or from the start, up to ``--steps``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="the last step of the run")
    parser.add_argument("--legacy", type=Path, help="a file of torch.save to begin with")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100_000)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "random": RandomNumbers()}

    with cloudckpt.Checkpointer(os.environ["CHECKPOINT_URI"], keep_last=3, every_steps=5) as checkpointer:
        start = begin(checkpointer, state, args.legacy)
        print(f"from step {start}", flush=True)
        for step in range(start + 1, args.steps + 1):
            loss = model(torch.rand(16, 32)).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            checkpointer.async_save(step, state)
            print(f"step {step} loss {loss.item()!r}", flush=True)
    print("done", flush=True)


def begin(checkpointer: cloudckpt.Checkpointer, state: dict[str, Any], legacy: Path | None) -> int:
    """Load what there is into the state, and return its step."""
    if checkpointer.latest_step() is not None:
        return checkpointer.load(state)
    if legacy is None:
        return 0
    old = torch.load(legacy, weights_only=True)
    for name in ("model", "optimizer", "scheduler"):
        state[name].load_state_dict(old[name])
    torch.set_rng_state(old["rng"])
    checkpointer.save(old["step"], state)  # from now on the old file is not needed
    return int(old["step"])


class RandomNumbers:
    """What `torch.get_rng_state` knows, asked when the state is saved and not when it was made."""

    def state_dict(self) -> dict[str, Any]:
        """Return where the generator is."""
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        torch.set_rng_state(state["torch"])


if __name__ == "__main__":
    main()
