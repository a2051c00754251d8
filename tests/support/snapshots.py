"""Snapshots and what comes back of them in one process, and programs that share descriptors with a test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from cloudckpt.executor.snapshot import snapshot
from cloudckpt.executor.snapshot.arena import Arena
from cloudckpt.executor.snapshot.snapshot import Snapshot

State = dict[str, Any]


@contextmanager
def round_trip(state: State) -> Iterator[tuple[Snapshot, State]]:
    """Take a snapshot, and restore it from a mapping of its own as the checkpoint process does."""
    arena = Arena()
    taken = snapshot.take(state, arena)
    mapped = Arena.attach(os.dup(arena.fd), arena.nbytes)
    try:
        yield taken, snapshot.restore(taken, mapped)
    finally:
        mapped.close()
        arena.close()


def plain(value: Any) -> Any:
    """The state with DTensors that need no gradient, as a snapshot has them."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return value.detach() if isinstance(value, DTensor) else value


def planned(state: State, *, coordinator: bool) -> SavePlan:
    """Plan a state with DCP's own planner, without the strides of torch 2.15: a snapshot is compact."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=coordinator)
    plan = planner.create_local_plan()
    for item in plan.items:
        properties: Any = item.tensor_data and item.tensor_data.properties
        if hasattr(properties, "strides"):
            properties.strides = None
    return plan


class Program:
    """A Python program in a process of its own that inherits descriptors and answers line by line."""

    def __init__(self, source: str, *args: object, fds: tuple[int, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", source, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=fds,
            text=True,
        )

    def ask(self, line: object = "") -> str:
        """Send a line and return the one that answers it; an empty one means that the program ended."""
        self._pipe(self.process.stdin).write(f"{line}\n")
        self._pipe(self.process.stdin).flush()
        return self.listen()

    def listen(self) -> str:
        """The program's next line."""
        return self._pipe(self.process.stdout).readline().strip()

    def close(self) -> int:
        """End its input, and return the exit code."""
        self._pipe(self.process.stdin).close()
        code = self.process.wait(60)
        self._pipe(self.process.stdout).close()
        return code

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


@contextmanager
def program(source: str, *args: object, fds: tuple[int, ...] = ()) -> Iterator[Program]:
    """Run a `Program`, which is killed if it hasn't ended when the block does."""
    running = Program(source, *args, fds=fds)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.close()
