"""One rank of a job that trains until it is told to end.

Run as ``python -m support.preempted URI GRACE HOW MEETING RANK RANKS``, or under torchrun without the last
three. Before the first step it resumes. It prints its process id, the step that it resumes from, then each
step that it has done, and at the end how that came. Nothing but the last step is due for saving.

``HOW``: ``steps`` trains on; ``stuck`` waits in a collective that another rank never comes to after step 3;
``slow`` takes a step that does not end, after step 3; ``ends`` leaves the loop after step 3, and goes on.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import cloudckpt

ROWS = 512
NOT_DUE = 10**9


def say(*words: object) -> None:
    # In one write: torchrun has both ranks write to one pipe, without a buffer.
    sys.stdout.write(f"{' '.join(map(str, words))}\n")
    sys.stdout.flush()


def main(uri: str, grace: str, how: str) -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weights = distribute_tensor(torch.full((ROWS, 64), -1.0), mesh, [Shard(0)])
    state = {"weights": weights, "step": -1}
    with cloudckpt.Checkpointer(uri, every_steps=NOT_DUE, preemption_grace=float(grace)) as checkpointer:
        checkpointer.warmup(state)
        step = 0
        if checkpointer.latest_step() is not None:
            step = checkpointer.load(state)
            assert state["step"] == step
            assert bool((weights.to_local() == float(step)).all()), f"step {step} is a mixture"
        first = step
        say("pid", os.getpid())
        say("resumed", step)
        try:
            while True:
                step += 1
                if how != "steps" and step == first + 4:
                    if how == "ends":
                        break
                    if how == "slow" or rank == 1:
                        threading.Event().wait()
                dist.all_reduce(torch.ones(1))
                weights.to_local().fill_(float(step))
                state["step"] = step
                checkpointer.async_save(step, state)
                say("step", step)
        except cloudckpt.Preempted as end:
            say("last", end.step, "committed" if end.info else "given-up")
            raise
        finally:
            say("unwound")
    say("goes on")
    threading.Event().wait()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(name)s: %(message)s")
    if len(sys.argv) > 4:
        meeting, (on, ranks) = sys.argv[4], map(int, sys.argv[5:])
        dist.init_process_group("gloo", store=dist.FileStore(meeting, ranks), rank=on, world_size=ranks)
    else:
        dist.init_process_group("gloo")
    main(*sys.argv[1:4])
