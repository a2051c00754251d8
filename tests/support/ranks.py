"""Rank processes that stay warm: run a function on every rank of a gloo group, again and again.

Starting a process that imports torch costs seconds, so a pool lives as long as the test session. A call
that passes its deadline fails with the stack of every rank, and the next call starts new processes.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import cloudpickle  # type: ignore[import-untyped]
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")

DEADLINE = 120.0
"""Seconds that one call may take before its ranks count as hung."""
START_DEADLINE = 120.0
"""Seconds that the ranks of a pool may take to import torch and to meet."""
_LAST_WORDS = 10.0
"""Seconds that a rank may take to write its stack and die, or to leave the group and end."""


class RankFailure(RuntimeError):
    """A rank raised an exception that cannot be pickled; the message is its traceback."""


class RanksHung(AssertionError):
    """Ranks passed the deadline, or died; the message holds their stacks."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What one rank's call came to: a value, or the exception that it raised."""

    rank: int
    value: T | None = None
    error: BaseException | None = None

    def unwrap(self) -> T:
        """Return the value, or raise the rank's exception."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


@dataclass(slots=True)
class _Rank:
    rank: int
    process: BaseProcess
    connection: Connection
    stack_file: Path


class RankPool:
    """``world_size`` processes in one gloo group; with one rank, this process and no group.

    ``pool(fn, *args)`` calls ``fn(rank, *args)`` on every rank and returns the values by rank. ``fn`` may be
    a closure or belong to a test module: it travels by value.
    """

    def __init__(self, world_size: int, *, deadline: float = DEADLINE) -> None:
        self.world_size = world_size
        self.deadline = deadline
        self._ranks: list[_Rank] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._generation = 0

    def __call__(self, fn: Callable[..., T], *args: Any, deadline: float | None = None) -> list[T]:
        """Return every rank's value, or raise what the lowest failing rank raised, noting who else did."""
        outcomes = self.outcomes(fn, *args, deadline=deadline)
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        if failed:
            error = failed[0].error
            assert error is not None
            for outcome in failed:
                raised = type(outcome.error).__name__
                error.add_note(f"rank {outcome.rank} of {self.world_size} raised {raised}")
            raise error
        return [outcome.unwrap() for outcome in outcomes]

    def outcomes(self, fn: Callable[..., T], *args: Any, deadline: float | None = None) -> list[Outcome[T]]:
        """Return what every rank's call came to, exceptions included.

        Raises:
            RanksHung: a rank did not answer within ``deadline`` seconds, or died. The next call starts anew.
        """
        if self.world_size == 1:
            return [_attempt(0, fn, args)]
        if not self._ranks:
            self._start()
        request = _dumps_by_value(fn, args)
        for rank in self._ranks:
            rank.connection.send_bytes(request)
        return self._collect(time.monotonic() + (deadline or self.deadline))

    def close(self) -> None:
        """End the processes."""
        for rank in self._ranks:
            rank.connection.close()
        for rank in self._ranks:
            rank.process.join(_LAST_WORDS)
        self._kill()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        self._generation += 1
        folder = Path(self._folder.name)
        meeting = folder / f"meeting-{self._generation}"
        spawn = multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = spawn.Pipe()
            stack_file = folder / f"stack-{self._generation}-{rank}"
            process = spawn.Process(
                target=_serve,
                args=(rank, self.world_size, meeting, stack_file, theirs),
                name=f"rank-{rank}",
                daemon=False,
            )
            process.start()
            theirs.close()
            self._ranks.append(_Rank(rank, process, ours, stack_file))
        for outcome in self._collect(time.monotonic() + START_DEADLINE):
            outcome.unwrap()

    def _collect(self, until: float) -> list[Outcome[Any]]:
        outcomes: dict[int, Outcome[Any]] = {}
        waiting: dict[object, _Rank] = {rank.connection: rank for rank in self._ranks}
        while waiting:
            answered = wait(
                [rank.connection for rank in waiting.values()], max(0.0, until - time.monotonic())
            )
            if not answered:
                silent = ", ".join(str(rank.rank) for rank in waiting.values())
                raise RanksHung(f"no answer in time from rank {silent}\n{self._last_words()}")
            for connection in answered:
                rank = waiting.pop(connection)
                outcomes[rank.rank] = self._receive(rank)
        return [outcomes[rank] for rank in sorted(outcomes)]

    def _receive(self, rank: _Rank) -> Outcome[Any]:
        try:
            answer = rank.connection.recv_bytes()
        except (EOFError, ConnectionError) as lost:
            rank.process.join(_LAST_WORDS)
            died = f"rank {rank.rank} died with exit code {rank.process.exitcode}"
            raise RanksHung(f"{died}\n{self._last_words()}") from lost
        outcome: Outcome[Any] = cloudpickle.loads(answer)
        return outcome

    def _last_words(self) -> str:
        """Have every rank write its stacks and die, then return what they wrote."""
        ranks = list(self._ranks)
        self._kill()
        return "\n".join(
            f"--- rank {rank.rank}\n{rank.stack_file.read_text() if rank.stack_file.exists() else ''}"
            for rank in ranks
        )

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.process.terminate()
        for rank in self._ranks:
            rank.process.join(_LAST_WORDS)
            if rank.process.is_alive():
                rank.process.kill()
                rank.process.join()
            rank.connection.close()
        self._ranks.clear()


def _serve(rank: int, world_size: int, meeting: Path, stack_file: Path, connection: Connection) -> None:
    """Be one rank: join the group, then answer calls until the pool hangs up."""
    with ExitStack() as stack:
        words = stack.enter_context(stack_file.open("w"))
        # The dump comes first and SIGTERM's own effect, death, after it: an ended process has said all.
        faulthandler.register(signal.SIGTERM, file=words, all_threads=True, chain=True)
        torch.set_num_threads(1)
        store = dist.FileStore(str(meeting), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        stack.callback(dist.destroy_process_group)
        connection.send_bytes(cloudpickle.dumps(Outcome(rank)))
        while True:
            try:
                request = connection.recv_bytes()
            except EOFError:
                return
            connection.send_bytes(_answer(rank, request))


def _answer(rank: int, request: bytes) -> bytes:
    outcome: Outcome[Any]
    try:
        fn, args = cloudpickle.loads(request)
        outcome = _attempt(rank, fn, args)
    except Exception as error:  # noqa: BLE001 - the request does not unpickle; the caller must learn why
        outcome = Outcome(rank, error=error)
    try:
        answer: bytes = cloudpickle.dumps(outcome)
        cloudpickle.loads(answer)
    except Exception:  # noqa: BLE001 - any exception may fail to pickle, and its text must reach the caller
        said = outcome.error if outcome.error is not None else TypeError(f"{outcome.value!r}")
        answer = cloudpickle.dumps(
            Outcome(rank, error=RankFailure("".join(traceback.format_exception(said))))
        )
    return answer


def _attempt(rank: int, fn: Callable[..., T], args: tuple[Any, ...]) -> Outcome[T]:
    try:
        return Outcome(rank, value=fn(rank, *args))
    except (Exception, CheckpointException) as error:  # noqa: BLE001 - carried to the caller, who raises it
        error.add_note("".join(traceback.format_exception(error)))
        return Outcome(rank, error=error)


def _dumps_by_value(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """Pickle a call; the test module that it comes from can't be imported by name, so it travels along."""
    module = sys.modules.get(fn.__module__)
    if module is None or not module.__name__.rpartition(".")[2].startswith("test_"):
        return bytes(cloudpickle.dumps((fn, args)))
    cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps((fn, args)))
    finally:
        cloudpickle.unregister_pickle_by_value(module)


RankPools = Callable[[int], RankPool]


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPools]:
    """A factory of pools by world size: ``rank_pool(2)`` is the same two processes for the whole session."""
    pools: dict[int, RankPool] = {}
    with ExitStack() as stack:

        def pool(world_size: int) -> RankPool:
            if world_size not in pools:
                pools[world_size] = stack.enter_context(RankPool(world_size))
            return pools[world_size]

        yield pool
