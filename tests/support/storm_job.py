"""A job that torchrun starts again and again: one rank ends during a save, but in the last start.

Run as ``torchrun … storm_job.py URI LOG START``, with the number of the start. Rank 0 appends to LOG which
step each start has resumed from, and the newest step that it found.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from cloudckpt import Checkpointer

WAYS: Final = ("SIGKILL", "an exception")


def main(uri: str, log: str, start: int) -> None:
    """Train three steps, and end before the last where another start follows."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with Checkpointer(uri, preemption_grace=5, progress=False, keep_last=2) as checkpointer:
        weights = torch.zeros(1 << 20)
        state: dict[str, Any] = {"w": weights, "step": 0}
        steps = checkpointer.all_steps()
        resumed = checkpointer.load(state) if steps else 0
        assert state["step"] == resumed
        assert set(weights.tolist()) == {resumed}
        if rank == 0:
            with Path(log).open("a") as lines:
                lines.write(f"{resumed} {max(steps, default=0)}\n")
        for step in range(resumed + 1, resumed + 4):
            weights.fill_(step)
            checkpointer.async_save(step, state | {"step": step})
            if step == resumed + 3 and start < len(WAYS) and rank == start % 2:
                if WAYS[start] == "SIGKILL":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError(f"start {start} ends")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
