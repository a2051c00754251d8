"""One rank of a job that resumes, trains and saves every step, until it is killed.

Run as ``python -m support.resumer URI FOLDER RANK RANKS`` with the folder where the ranks meet. It prints
the step that it resumes from, having checked every element of it, and then each step that it has seen
committed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import cloudckpt

ROWS = 4096


def main(uri: str, meeting: str, rank: int, ranks: int) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(meeting, ranks), rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    with cloudckpt.Checkpointer(uri, keep_last=2, part_size="256KiB", on_failure="raise") as checkpointer:
        weights = distribute_tensor(torch.full((ROWS, 64), -1.0), mesh, [Shard(0)])
        state = {"weights": weights, "step": -1}
        resumed = -1
        if checkpointer.latest_step() is not None:
            resumed = checkpointer.load(state)
            assert state["step"] == resumed
            assert bool((weights.to_local() == float(resumed)).all()), f"step {resumed} is a mixture"
        print("resumed", resumed, flush=True)  # noqa: T201 - told to its starter
        step = resumed
        while True:
            step += 1
            weights.to_local().fill_(float(step))
            state["step"] = step
            checkpointer.save(step, state)
            print("committed", step, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], str(Path(sys.argv[2])), int(sys.argv[3]), int(sys.argv[4]))
