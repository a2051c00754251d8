"""Processes that save to one place at one moment, lined up by a barrier, again and again.

Starting a process that imports torch takes seconds, so they are forked from a server that has imported all
and has neither threads nor connections.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from typing import Any
from unittest import mock

import psutil
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.backends.errors import CheckpointError
from cloudckpt.backends.save import commit
from support.places import Place

DEADLINE = 120.0
"""Seconds that one save may take, imports and waiting for all others included."""
_PRELOADED = [
    "cloudckpt",
    "cloudckpt.backends.stores.local.store",
    "cloudckpt.backends.stores.s3.store",
    "torch.distributed.checkpoint",
]
_LAST_WORDS = 10.0
"""Seconds that a process may take to end."""


@dataclass(frozen=True, slots=True)
class Order:
    """One save, and where in it the process waits."""

    place: Place
    overwrite: bool = False
    begin_with: int = 1
    """Begins once so many processes are about to."""
    commit_with: int = 1
    """Puts ``.metadata`` once so many processes are about to."""
    stops: bool = False
    """Stops right before it puts ``.metadata``, until it is sent SIGCONT."""


def state_of(number: int) -> dict[str, Any]:
    """What the process of this number saves."""
    return {"x": torch.full((1000,), number), "y": torch.full((10,), float(number)), "step": number}


class Racers:
    """``count`` processes, numbered from 0, each of which saves as it is told."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        # Kept: a barrier that is collected here can't be opened there any more.
        self._barriers = {parties: context.Barrier(parties) for parties in {2, count}}
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(number, theirs, self._barriers), name=f"racer-{number}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def race(self, orders: Sequence[Order]) -> list[CheckpointError | None]:
        """Give the first processes an order each, and return how their saves ended."""
        for number, order in enumerate(orders):
            self.begin(number, order)
        return [self.end(number) for number in range(len(orders))]

    def begin(self, number: int, order: Order) -> None:
        self._connections[number].send(order)

    def end(self, number: int) -> CheckpointError | None:
        """Wait for the end of a save: None for a success, or what it raised."""
        connection = self._connections[number]
        if not wait([connection], DEADLINE):
            raise TimeoutError(f"process {number} does not come to an end")
        answer: BaseException | None = connection.recv()
        if answer is not None and not isinstance(answer, CheckpointError):
            raise answer
        return answer

    def await_stop(self, number: int) -> None:
        """Wait until the process has stopped."""
        process, deadline = psutil.Process(self._processes[number].pid), time.monotonic() + DEADLINE
        while process.status() != psutil.STATUS_STOPPED:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {number} does not stop")
            time.sleep(0.01)

    def go_on(self, number: int) -> None:
        os.kill(self._processes[number].pid or 0, signal.SIGCONT)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(_LAST_WORDS)
            process.kill()
            process.join()


@contextmanager
def racers(count: int) -> Iterator[Racers]:
    with closing(Racers(count)) as started:
        yield started


def _serve(number: int, connection: Connection, barriers: Mapping[int, Barrier]) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            order = connection.recv()
        except EOFError:
            return
        connection.send(_save(number, order, barriers))


def _save(number: int, order: Order, barriers: Mapping[int, Barrier]) -> BaseException | None:
    put = commit.put_metadata

    def line_up(*args: Any) -> None:
        _meet(barriers, order.commit_with)
        if order.stops:
            os.kill(os.getpid(), signal.SIGSTOP)
        put(*args)

    try:
        with mock.patch.object(commit, "put_metadata", line_up):
            writer = order.place.writer(overwrite=order.overwrite)
            _meet(barriers, order.begin_with)
            dcp.save(state_of(number), storage_writer=writer, no_dist=True)
    except CheckpointException as error:
        return error.failures[0][0]
    except Exception as error:  # noqa: BLE001 - carried to the test, which raises it
        return error
    return None


def _meet(barriers: Mapping[int, Barrier], parties: int) -> None:
    if parties > 1:
        barriers[parties].wait(DEADLINE)
