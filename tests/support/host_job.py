"""A rank of a job on a host of a test's own: saves, loads, and prints what came of it as JSON."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import cloudckpt
from cloudckpt.executor.network import store_group
from cloudckpt.executor.network.agreement import leave_last

_LEAVING = 120.0
_SAID: list[str] = []


class _Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _SAID.append(f"{record.levelname} {record.getMessage()}")


def main(uri: str, options: dict[str, Any], start_timeout: float) -> None:
    """Run the job: a save in the background, one in the foreground, and a load."""
    logging.getLogger("cloudckpt").setLevel(logging.INFO)
    logging.getLogger("cloudckpt").addHandler(_Listener())
    # Training's own collectives, which NCCL would carry, go through its store: nothing but that is open.
    dist.Backend.register_backend(store_group.BACKEND, store_group.StoreGroup, devices=["cpu"])
    dist.init_process_group(store_group.BACKEND, init_method="env://")
    rank = dist.get_rank()
    outcome: dict[str, Any] = {"rank": rank, "errors": [], "took": {}}

    def tried(what: str, call: Callable[[], Any]) -> Any:
        began = time.monotonic()
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - the test judges it
            outcome["errors"].append([what, type(error).__name__, str(error)])
        finally:
            outcome["took"][what] = time.monotonic() - began

    state = {"weights": torch.arange(1000.0), f"own-{rank}": torch.full((10,), float(rank))}
    dist.barrier()
    if "CLOSE" in os.environ and rank == 0:
        sys.stdout.write("connected\n")
        sys.stdout.flush()
        sys.stdin.readline()
    dist.barrier()
    checkpointer = tried(
        "make",
        lambda: cloudckpt.Checkpointer(
            uri,
            start_timeout=start_timeout,
            save_timeout=float(os.environ.get("SAVE_TIMEOUT", "60")),
            **options,
        ),
    )
    if checkpointer is not None:
        handle = tried("async_save", lambda: checkpointer.async_save(1, state))
        outcome["trained"] = 0
        while handle is not None and not handle.done():
            torch.rand(64, 64).sum()
            outcome["trained"] += 1
            time.sleep(0.01)
        if handle is not None:
            tried("result", handle.result)
        tried("save", lambda: checkpointer.save(2, state))
        state["weights"].zero_()
        outcome["loaded"] = tried("load", lambda: checkpointer.load(state))
        outcome["right"] = bool(torch.equal(state["weights"], torch.arange(1000.0)))
        for step in range(3, 3 + int(os.environ.get("STEPS", "0"))):
            state["weights"] = torch.full((1000,), float(step))
            handle = tried(f"begin {step}", functools.partial(checkpointer.async_save, step, state))
            if handle is not None:
                tried(f"step {step}", handle.result)
        outcome["steps"] = tried("all_steps", checkpointer.all_steps)
        outcome["last"] = tried("load the last", lambda: checkpointer.load(state))
        outcome["weights"] = state["weights"][0].item()
        tried("close", checkpointer.close)
    outcome["said"] = _SAID
    sys.stdout.write(f"{json.dumps(outcome)}\n")
    sys.stdout.flush()
    _leave(rank)


def _leave(rank: int) -> None:
    """End this rank, rank 0 last: the store ends with it."""
    leave_last(dist.distributed_c10d._get_default_store(), rank, dist.get_world_size(), _LEAVING)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3]))
