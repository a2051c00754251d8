"""A worker: a process that holds a state, saves and loads it by one peer again and again, and times itself.

One worker a peer and state. Before anything is measured it saves and loads a tiny state, so that all modules
are imported, and touches every page of its tensors. What is resident then is what its memory is compared
with.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch.distributed.checkpoint.api import CheckpointException

from bench.peers import Opened, Peer, Place
from bench.states import Shape, State, bytes_of, differences, emptied, tensors_of
from support.hosts import enter
from support.peak import status

What = Literal["save", "load"]

_DEADLINE = 900.0
"""Seconds that a worker may take for one answer."""
_LAST_WORDS = 60.0
"""Seconds that a worker may take to end."""
_WORDS = 120
"""Characters of an error that are told."""


class WorkerFailed(Exception):
    """A peer could not save or load; the message says why."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What a save or a load took of the process that did it."""

    seconds: float
    cpu_seconds: float
    """On all its threads, in user and in kernel mode."""
    extra_bytes: int
    """Resident at the peak beyond what the idle worker held at first: memory kept for later counts."""
    wrong: Sequence[str] = ()
    """What was loaded and isn't what was saved."""


class Worker:
    """A worker as the benchmark holds it. It starts at once; ``ready`` waits until it can measure."""

    def __init__(self, peer: Opened, place: Place, shape: Shape, shared: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # torch takes seconds to import; once will do
        self._connection, theirs = context.Pipe()
        place.folder.mkdir(parents=True)
        self._log = _log_in(place.folder)
        self._process = context.Process(target=_serve, args=(peer, place, shape, shared, theirs))
        self._process.start()
        theirs.close()

    def ready(self) -> int:
        """Wait for it, and learn how many bytes of tensors it holds.

        Raises:
            WorkerFailed: it could not start.
        """
        nbytes: int = self._answer()
        return nbytes

    def measure(self, what: What, name: str) -> Spent:
        """Have it save under that name, or load what was saved there.

        Raises:
            WorkerFailed: it could not, or did not answer.
        """
        try:
            self._connection.send((what, name))
        except OSError as error:
            raise self._ended() from error
        spent: Spent = self._answer()
        return spent

    def _answer(self) -> Any:
        try:
            if not self._connection.poll(_DEADLINE):
                self._process.kill()
                raise WorkerFailed(f"no answer in {_DEADLINE:.0f} s")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if isinstance(answer, str):
            raise WorkerFailed(answer)
        return answer

    def _ended(self) -> WorkerFailed:
        self._process.join(_LAST_WORDS)
        words = self._log.read_text().strip().rpartition("\n")[2] if self._log.exists() else ""
        return WorkerFailed(f"it ended with exit code {self._process.exitcode}: {words}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        try:
            if kind is None:  # else it may be at work, and nobody waits for that any more
                self._process.join(_LAST_WORDS)
        finally:
            if self._process.is_alive():
                self._process.kill()
                self._process.join()


def _serve(opened: Opened, place: Place, shape: Shape, shared: Path, connection: Connection) -> None:
    """Save and load as asked, until the benchmark hangs up."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    os.environ.update(place.variables())
    if place.namespace is not None:
        enter(place.namespace)  # before there is another thread
    with _log_in(place.folder).open("w") as sink:
        os.dup2(sink.fileno(), 2)  # what ends a process without an exception says so there
    with opened(place) as peer:
        bench = _Bench(peer, shape, shared)
        connection.send(bench.nbytes)
        while True:
            try:
                what, name = connection.recv()
            except EOFError:
                return
            try:
                answer: Spent | str = bench.save(name) if what == "save" else bench.load(name)
            except (Exception, CheckpointException) as error:  # noqa: BLE001 - the table says so
                answer = _told(error)
            connection.send(answer)


def _log_in(folder: Path) -> Path:
    return folder / "log"


def _told(error: BaseException) -> str:
    """One line, of the error that DCP wrapped in its own where it did."""
    if isinstance(error, CheckpointException):
        error = next((cause for cause, _ in error.failures.values()), error)
    return f"{type(error).__name__}: {error}".partition("\n")[0][:_WORDS]


class _Bench:
    """What a worker holds: a state, and tensors like it to load into."""

    def __init__(self, peer: Peer, shape: Shape, shared: Path) -> None:
        self._peer = peer
        self._warm_up()
        self._saved, self._blank = shape.make(shared)
        self.nbytes = bytes_of(self._saved)
        # Reading maps the pages of the one, writing those of the other.
        for tensor in tensors_of(self._saved):
            tensor.sum()
        emptied(self._blank)
        gc.collect()
        self._idle = status("VmRSS")

    def save(self, name: str) -> Spent:
        self._peer.prepare(self._saved)
        return self._spent(lambda: self._peer.save(self._saved, name))

    def load(self, name: str) -> Spent:
        """Load into tensors that hold something else, and compare."""
        loaded = emptied(self._blank)
        self._peer.prepare(loaded)
        spent = self._spent(lambda: self._peer.load(loaded, name))
        return replace(spent, wrong=self._wrong(loaded))

    def _wrong(self, loaded: State) -> list[str]:
        if not self._peer.fills_tensors:
            return []
        if self._peer.moves_plain_values:
            return differences(loaded, self._saved)
        found, expected = (dict(enumerate(tensors_of(state))) for state in (loaded, self._saved))
        return differences({"tensor": found}, {"tensor": expected})

    def _spent(self, task: Callable[[], object]) -> Spent:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        cpu, start = _cpu_seconds(), time.perf_counter()
        task()
        seconds, cpu = time.perf_counter() - start, _cpu_seconds() - cpu
        extra = max(0, status("VmHWM") - self._idle)
        return Spent(seconds, cpu, extra)

    def _warm_up(self) -> None:
        tiny = {"model": {"tensor": torch.ones(4096)}}
        self._peer.prepare(tiny)
        self._peer.save(tiny, "warm-up")
        with contextlib.suppress(Exception, CheckpointException):  # the table will say so of what is measured
            self._peer.load(tiny, "warm-up")


def _cpu_seconds() -> float:
    """Return the seconds of this process and of the programs that it has run."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
