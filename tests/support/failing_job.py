"""One rank of a job that fails: ``failing_job.py CASE URI``, started without torchrun."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

import cloudckpt


class Broken:
    """A part of a state that raises on rank 1."""

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == 1:
            raise KeyError("a key of the user's")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""


def fail(case: str, checkpointer: cloudckpt.Checkpointer) -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    state: dict[str, Any] = {"model": torch.nn.Linear(8, 8), "t": torch.zeros(4)}
    if case == "unsupported":
        checkpointer.save(1, {**state, "f": (lambda: None) if rank == 1 else 1})
    elif case == "state_dict":
        checkpointer.save(1, {**state, "broken": Broken()})
    elif case == "conflict":
        checkpointer.save(1, {**state, "rate": 0.1 * (rank + 1)})
    elif case == "steps":
        checkpointer.save(1 + (rank == 2), state)
    checkpointer.save(1, state)
    if case == "shapes":
        checkpointer.load({"model": torch.nn.Linear(8, 9), "t": torch.zeros(4)})
    elif case == "shape":
        checkpointer.load({"model": torch.nn.Linear(8, 9 if rank == 1 else 8), "t": torch.zeros(4)})
    elif case == "missing":
        checkpointer.load({**state, "more": torch.zeros(3)})
    elif case == "loads":
        checkpointer.load(state, step=1 + (rank == 2))
    elif case == "background":
        checkpointer.async_save(2, {**state, "f": (lambda: None) if rank == 1 else 1})
        checkpointer.wait()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    fail(sys.argv[1], cloudckpt.Checkpointer(sys.argv[2], progress=False, preemption_grace=None))
