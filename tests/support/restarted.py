"""A rank that torchrun restarts: the store of the launcher stays, and ranks had come to different points."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import cloudckpt


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    begun = Path(folder) / "begun"
    if first and rank == 1:
        while not begun.exists():
            time.sleep(0.05)
        sys.exit("this rank fails before its first save")
    checkpointer = cloudckpt.Checkpointer(f"file://{folder}/run", start_timeout=60)
    if first:
        checkpointer.async_save(1, {"weights": torch.ones(10)})
        begun.touch()
        time.sleep(600)  # until torchrun ends it
    checkpointer.save(2, {"weights": torch.ones(10)})
    checkpointer.close()


if __name__ == "__main__":
    main(sys.argv[1])
