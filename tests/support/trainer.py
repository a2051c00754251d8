"""A training script for tests that need a trainer of their own: to be killed, to end, or to be cut off.

It reads commands from its standard input, one a line, and answers each with a line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from cloudckpt.executor import ProcessExecutor, SaveHandle
from support.executors import small_state
from support.saboteurs import Saboteur


class Trainer:
    def __init__(self, arguments: dict[str, Any]) -> None:
        self.folder = Path(arguments["folder"])
        self.rank = arguments.get("rank", 0)
        if "init_method" in arguments:
            dist.init_process_group(
                "gloo",
                init_method=arguments["init_method"],
                rank=self.rank,
                world_size=arguments["world_size"],
            )
        self.executor = ProcessExecutor(**arguments.get("executor", {}))
        self.handles: list[SaveHandle[Metadata]] = []

    def warmup(self) -> None:
        self.executor.warmup(small_state(0, self.rank))

    def pid(self) -> int | None:
        return self.executor.pid

    def generation(self) -> int | None:
        return self.executor.generation

    def begin(self, step: int, where: str | None = None, what: str = "raise", rank: int = 0) -> None:
        writer = Saboteur(f"file://{self.folder}/step-{step}", where, what, rank, folder=self.folder)
        self.handles.append(self.executor.execute_save(small_state(step, self.rank), storage_writer=writer))

    def result(self) -> dict[str, Any]:
        (self.folder / f"waiting-{self.rank}").touch()
        error = self.handles[-1].exception(timeout=120)
        if error is None:
            return {"error": None}
        return {"error": type(error).__name__, "said": str(error), "rank": getattr(error, "rank", None)}

    def save(self, step: int, *how: Any) -> dict[str, Any]:
        self.begin(step, *how)
        return self.result()

    def close(self) -> None:
        self.executor.close()

    def fork(self) -> int:
        """A data loader's worker, which holds all descriptors and outlives the trainer."""
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            threading.Event().wait()
        return pid


def main() -> None:
    torch.set_num_threads(1)
    trainer = Trainer(json.loads(sys.argv[1]))
    print(json.dumps({"value": os.getpid()}), flush=True)  # noqa: T201 - the protocol
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        if name == "leave":  # as a script that comes to its end
            return
        try:
            answer = {"value": getattr(trainer, name)(*arguments)}
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - told to the test
            answer = {"raised": type(error).__name__, "said": str(error)}
        print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
