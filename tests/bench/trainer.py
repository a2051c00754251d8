"""A trainer: a process that holds a state, saves it in one form again and again, and times itself."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.distributed.checkpoint.api import CheckpointException

from bench.forms import FORMS, Form, State

_DEADLINE = 900.0
"""Seconds that a trainer may take for one answer."""
_LAST_WORDS = 60.0
"""Seconds that a trainer may take to end."""
_COPIES = 3
"""Bare copies before each save, of which the median counts."""
_SIDES = {"cpu": 256, "cuda": 4096}
"""A step multiplies square matrices of this many rows."""


class TrainerFailed(Exception):
    """A form could not save; the message says why."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A state: so many float32 tensors of one size. ``steps``: whether steps are timed beside its saves."""

    name: str
    tensors: int
    elements: int
    steps: bool
    device: str = "cpu"

    @property
    def nbytes(self) -> int:
        return 4 * self.tensors * self.elements

    def make(self) -> State:
        tensors = (torch.rand(self.elements, device=self.device) for _ in range(self.tensors))
        return {"model": {f"tensor-{number}": tensor for number, tensor in enumerate(tensors)}}

    def host_memory(self) -> State:
        """Memory of the host that the state fits into; locked where it is copied from a device."""
        pinned = self.device != "cpu"
        tensors = (torch.ones(self.elements, pin_memory=pinned) for _ in range(self.tensors))
        return {"model": {f"tensor-{number}": tensor for number, tensor in enumerate(tensors)}}


@dataclass(frozen=True, slots=True)
class Sample:
    """One save: times of the call, the bare copy, the whole save, and each step beside and after it."""

    blocked_ms: float
    bare_ms: float
    save_ms: float
    saving_ms: list[float]
    idle_ms: list[float]


class Trainer:
    """A trainer as the benchmark holds it."""

    def __init__(self, form: str, rounds: int, folder: Path, device: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._log = folder / "log"
        folder.mkdir()
        self._process = spawn.Process(target=_serve, args=(form, rounds, folder, device, theirs), name=form)
        self._process.start()
        theirs.close()

    def measure(self, shape: Shape) -> Sample:
        """Have it save a state of that shape once.

        Raises:
            TrainerFailed: it could not, or did not answer.
        """
        try:
            self._connection.send(shape)
            if not self._connection.poll(_DEADLINE):
                raise TrainerFailed(f"no answer in {_DEADLINE:.0f} s")
            answer: Sample | str = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(_LAST_WORDS)
            words = self._log.read_text().strip().rpartition("\n")[2] if self._log.exists() else ""
            raise TrainerFailed(f"it ended with exit code {self._process.exitcode}: {words}") from error
        if isinstance(answer, str):
            raise TrainerFailed(answer)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(_LAST_WORDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def rounds_of(milliseconds: float, device: str) -> int:
    """How many multiplications make a step of about that length on this machine."""
    torch.set_num_threads(1)
    step = make_step(1, device)
    for _ in range(20):
        step()
    return max(1, round(milliseconds / min(step() for _ in range(200))))


def make_step(rounds: int, device: str) -> Callable[[], float]:
    """A training step, which returns its milliseconds."""
    side = _SIDES[device]
    left, right, out = (torch.rand(side, side, device=device) for _ in range(3))

    def step() -> float:
        start = time.perf_counter()
        for _ in range(rounds):
            torch.mm(left, right, out=out)
        _synchronize(device)
        return _since(start)

    return step


def _serve(form: str, rounds: int, folder: Path, device: str, connection: Connection) -> None:
    """Save a state of the shape that is asked for, until the benchmark hangs up."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    with (folder / "log").open("w") as log:
        os.dup2(log.fileno(), 2)  # DCP's process tells every save there
    torch.set_num_threads(1)
    try:
        with FORMS[form]() as saver:
            bench = _Bench(saver, make_step(rounds, device), folder)
            while True:
                connection.send(bench.sample(connection.recv()))
    except EOFError:
        return
    except (Exception, CheckpointException) as error:  # noqa: BLE001 - the table says so
        connection.send(f"{type(error).__name__}: {error}".partition("\n")[0])


class _Bench:
    """What a trainer holds: a state, and memory of the same size that is warm."""

    def __init__(self, form: Form, step: Callable[[], float], folder: Path) -> None:
        self._form = form
        self._step = step
        self._folder = folder
        self._shape: Shape | None = None
        self._state: State = {}
        self._warm: State = {}

    def sample(self, shape: Shape) -> Sample:
        if shape != self._shape:
            self._state, self._warm = {}, {}  # or there would be two at once
            self._shape, self._state, self._warm = shape, shape.make(), shape.host_memory()
            self._form.prepare(self._state)
        bare = statistics.median(self._bare_copy(shape.device) for _ in range(_COPIES))
        to = self._folder / "checkpoint"
        start = time.perf_counter()
        saved = self._form.save(self._state, to)
        blocked = _since(start)
        saving: list[float] = []
        while shape.steps and not (saving and saved.done()):
            saving.append(self._step())
        saved.result()
        whole = _since(start)
        idle = [self._step() for _ in saving]
        shutil.rmtree(to)
        return Sample(blocked, bare, whole, saving, idle)

    def _bare_copy(self, device: str) -> float:
        _synchronize(device)
        start = time.perf_counter()
        for part, tensors in self._state.items():
            for name, tensor in tensors.items():
                self._warm[part][name].copy_(tensor, non_blocking=True)
        _synchronize(device)
        return _since(start)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _since(start: float) -> float:
    return 1e3 * (time.perf_counter() - start)
