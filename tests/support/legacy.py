"""The loop that ``examples/recipes/replace_torch_save.py`` takes over, as it was with ``torch.save``.

Run as ``legacy.py FILE STEPS``. It says what the recipes say.
"""

from __future__ import annotations

import sys

import torch


def main(file: str, steps: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100_000)
    sys.stdout.write("from step 0\n")
    for step in range(1, steps + 1):
        loss = model(torch.rand(16, 32)).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "step": step,
            "rng": torch.get_rng_state(),
        }
        torch.save(state, file)
        sys.stdout.write(f"step {step} loss {loss.item()!r}\n")
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
