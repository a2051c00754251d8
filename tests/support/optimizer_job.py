"""One rank of a job that saves every combination, or that resumes each in a fresh process.

Run as ``python -m support.optimizer_job PHASE FOLDER RANK RANKS``, where PHASE is ``save`` or ``resume``. The
folder has a ``job.json``. It leaves ``PHASE-RANK.json``: a trace or an outcome for each combination.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh

import cloudckpt
from support.optimizer_training import AFTER, Run
from support.optimizers import RESTORED, Combination
from support.states import compare, world_mesh

Trace = dict[str, Any]


class FailedError(Exception):
    """What a rank failed at, the same on every rank."""


class Store(Protocol):
    """Saves and loads the state of a run under a number."""

    def save(self, number: int, run: Run) -> Callable[[], object]: ...

    def load(self, number: int, run: Run) -> None: ...


class ByCheckpointer:
    """cloudckpt, by its public interface."""

    def __init__(self, folder: Path) -> None:
        self.checkpointer = cloudckpt.Checkpointer(folder / "run", progress=False, on_failure="warn")

    def save(self, number: int, run: Run) -> Callable[[], object]:
        state = {"model": run.model, "optimizer": run.optimizer}
        return self.checkpointer.async_save(number, state).result

    def load(self, number: int, run: Run) -> None:
        self.checkpointer.load({"model": run.model, "optimizer": run.optimizer}, number)


class ByTorch:
    """``torch.save`` of both state dicts, on each rank.

    Args:
        whole: load the optimizer as well, and not the weights alone.
    """

    def __init__(self, folder: Path, rank: int, *, whole: bool) -> None:
        self._folder, self._rank, self._whole = folder, rank, whole

    def save(self, number: int, run: Run) -> Callable[[], object]:
        torch.save([run.model.state_dict(), run.optimizer.state_dict()], self._file(number))
        return lambda: None

    def load(self, number: int, run: Run) -> None:
        model, optimizer = torch.load(self._file(number), weights_only=False)
        run.model.load_state_dict(model)
        if self._whole:
            run.optimizer.load_state_dict(optimizer)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}-{self._rank}.pt"


def saved(combination: Combination, number: int, store: Store, mesh: DeviceMesh | None) -> Trace:
    """Train to the point, save, go on, and return how it went."""
    with together("torch"):
        run = Run(combination, mesh)
        run.train(0, combination.point)
        run.arrange(combination.point)
        if combination.event == "gradients" and not combination.point:
            run.warm_up()
    before, beside = run.described(), run.beside()
    with together("save"):
        finish = store.save(number, run)
    with together("disturbed by the save"):
        _same(run.described(), before)
        _same(run.beside(), beside)
    with together("torch"):
        run.train(combination.point, AFTER)
    with together("save"):
        finish()
    return {"losses": run.losses, "described": run.described()}


def resumed(
    combination: Combination, number: int, trace: Trace | str, store: Store, mesh: DeviceMesh | None
) -> None:
    """Train undisturbed, and then from what was saved; both come to the same."""
    with together("torch"):
        whole = Run(combination, mesh)
        whole.train(0, combination.point)
        at_point = whole.described()
        whole.train(combination.point, AFTER)
    with together(""):
        if isinstance(trace, str):
            raise FailedError(trace)
    with together("disturbed by the save"):
        _same(trace["losses"], whole.losses)
        _same(trace["described"], json.loads(json.dumps(whole.described())))
    with together("torch"):
        run = Run(combination, mesh)
        run.arrange(combination.point)
        if combination.event == "gradients":
            run.warm_up()
    beside = run.beside()
    with together("load"):
        store.load(number, run)
    with together("not restored"):
        _same(run.described(), at_point)
        _same(run.beside(), beside)
    with together("diverged"):
        run.train(combination.point, AFTER)
        _same(run.losses, whole.losses[combination.point :])
        _same(run.described(), whole.described())


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Fail on every rank where one fails, so that none is left alone in a collective."""
    problem = None
    try:
        yield
    except FailedError as error:
        problem = str(error)
    except (Exception, CheckpointException) as error:  # noqa: BLE001 - whatever it is, it is an outcome
        problem = f"{what}: {type(error).__name__}: {error}"
    problems = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    if first := next((one for one in problems if one is not None), None):
        raise FailedError(first)


def _same(actual: Any, expected: Any) -> None:
    if found := compare(actual, expected):
        raise ValueError("; ".join(found))


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except FailedError as error:
        return str(error)


def main(phase: str, folder: Path, rank: int, ranks: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text())
    with contextlib.ExitStack() as stack:
        mesh = None
        if ranks > 1:
            meeting = dist.FileStore(str(folder / f"meeting-{phase}"), ranks)
            dist.init_process_group("gloo", store=meeting, rank=rank, world_size=ranks)
            stack.callback(dist.destroy_process_group)
            mesh = world_mesh()
        store: Store
        if job["saver"] == "cloudckpt":
            store = ByCheckpointer(folder)
            stack.enter_context(store.checkpointer)
        else:
            store = ByTorch(folder, rank, whole=job["saver"] == "torch.save")
        outcomes: list[Any] = []
        traces = json.loads((folder / f"save-{rank}.json").read_text()) if phase == "resume" else []
        for number, parts in enumerate(job["combinations"]):
            one = Combination(*parts)
            if phase == "save":
                outcomes.append(_outcome(lambda: saved(one, number, store, mesh)))  # noqa: B023 - called at once
            else:
                work = lambda: resumed(one, number, traces[number], store, mesh)  # noqa: B023, E731
                outcomes.append(_outcome(work) or RESTORED)
        (folder / f"{phase}-{rank}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
