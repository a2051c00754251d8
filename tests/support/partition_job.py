"""A rank of a job whose network is cut by a test: it saves when it is told to, and reports each save.

It reads commands from its standard input, one JSON list a line, and writes JSON lines. During a save rank 0
also writes each phase that its checkpoint process enters.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import cloudckpt
from cloudckpt import CheckpointInfo, SaveHandle
from cloudckpt.executor.network import store_group

_LOOK = 0.0005
"""Seconds between two looks at the phase of a save."""


class Rank:
    """One rank, whose methods are the commands."""

    def __init__(self, uri: str, options: dict[str, Any]) -> None:
        # Training's own collectives go through its store: the test cuts all other connections of the hosts.
        dist.Backend.register_backend(store_group.BACKEND, store_group.StoreGroup, devices=["cpu"])
        dist.init_process_group(store_group.BACKEND, init_method="env://")
        self._rank = dist.get_rank()
        self._checkpointer = cloudckpt.Checkpointer(uri, **options)

    def save(self, step: int) -> dict[str, Any]:
        """Save a step, and report whether it was committed, or the error."""
        state = {"weights": torch.full((4096,), float(step)), f"own-{self._rank}": torch.ones(16)}
        began = time.monotonic()
        try:
            handle = self._checkpointer.async_save(step, state)
            if self._rank == 0:
                self._follow(handle)
            handle.result()
        except Exception as error:  # noqa: BLE001 - the test judges it
            told = [type(error).__name__, str(error)]
        else:
            told = []
        return {"error": told, "seconds": time.monotonic() - began}

    def look(self) -> dict[str, Any]:
        """Report the steps that there are, and load the newest one."""
        state = {"weights": torch.zeros(4096)}
        steps = self._checkpointer.all_steps()
        latest = self._checkpointer.latest_step()
        loaded = self._checkpointer.load(state) if steps else None
        return {
            "steps": steps,
            "latest": latest,
            "loaded": loaded,
            "right": loaded is None or bool((state["weights"] == float(loaded)).all()),
        }

    def _follow(self, handle: SaveHandle[CheckpointInfo]) -> None:
        last = None
        while not handle.done():
            phase = handle.progress.phase
            if phase != last:
                _tell({"phase": phase})
                last = phase
            time.sleep(_LOOK)


def _tell(value: object) -> None:
    sys.stdout.write(f"{json.dumps(value)}\n")
    sys.stdout.flush()


def main(uri: str, options: dict[str, Any]) -> None:
    """Do what the test says until it closes the pipe."""
    rank = Rank(uri, options)
    commands: dict[str, Callable[..., Any]] = {"save": rank.save, "look": rank.look}
    _tell({"ready": os.getpid()})
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            _tell({"done": commands[name](*arguments)})
        except Exception as error:  # noqa: BLE001 - the test judges it
            _tell({"raised": [type(error).__name__, str(error)]})
    os._exit(0)  # the network may still be cut


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
