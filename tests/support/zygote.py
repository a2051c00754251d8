"""A process that has imported torch and forks trainers, which start at once and end as they are told.

It reads a line of JSON for each trainer: the URI, options, and the number of steps to save. Each trainer
resumes from the newest step, says so, and saves the next ones, until it is killed or has saved so many.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch

import cloudckpt


def train(uri: str, options: dict[str, Any], steps: int, how: str) -> None:
    state: dict[str, Any] = {"weights": torch.zeros(16 << 20, dtype=torch.uint8), "step": 0}
    checkpointer = cloudckpt.Checkpointer(uri, progress=False, **options)
    newest = checkpointer.latest_step()
    if newest is not None:
        checkpointer.load(state)
    print("resumed", newest, state["step"], os.getpid(), flush=True)  # noqa: T201 - the protocol
    for step in range(state["step"] + 1, state["step"] + 1 + steps):
        state["weights"], state["step"] = torch.randint(255, (16 << 20,), dtype=torch.uint8), step
        checkpointer.save(step, state)
        if how == "raise":
            raise RuntimeError("the training fails")
    checkpointer.close()


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                train(*json.loads(line))
                status = 0
            finally:
                os._exit(status)
        print("started", pid, flush=True)  # noqa: T201
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
