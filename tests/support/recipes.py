"""Recipes as their users run them: trained, killed with all their processes, and started again.

A recipe is a script in ``examples/recipes`` that takes ``--steps``, and its run from ``CHECKPOINT_URI``.
Its rank 0 prints ``from step N`` at its start, ``step N loss X`` after each step, and ``done``.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cloudckpt.backends.config.target import Target
from cloudckpt.run import Run
from support.places import Place

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "recipes"
ENDLESS = 10_000_000
BEYOND = 6
"""Steps that a run goes on for after it was resumed."""


@dataclass(slots=True)
class Told:
    """What a run printed of itself."""

    start: int | None = None
    losses: dict[int, str] = field(default_factory=dict)
    done: bool = False

    def take(self, line: str) -> None:
        if told := re.fullmatch(r"from step (\d+)", line):
            self.start = int(told[1])
        elif told := re.fullmatch(r"step (\d+) loss (\S+)", line):
            self.losses[int(told[1])] = told[2]
        self.done = self.done or line == "done"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A script, and how many ranks torchrun starts of it: none where it is started without torchrun."""

    script: str
    ranks: int = 0
    arguments: tuple[str, ...] = ()
    folder: Path = ROOT
    """Where it is started."""

    def start(self, place: Place, steps: int) -> subprocess.Popen[str]:
        launch = [sys.executable]
        if self.ranks:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        script = [str(RECIPES / self.script), "--steps", str(steps), *self.arguments]
        return started([*launch, *script], environment_at(place), self.folder)

    def run(self, place: Place, steps: int) -> Told:
        """Run to the end."""
        return finished(self.start(place, steps))

    def run_until_killed(self, place: Place, beyond: int = -1) -> None:
        """Run until a step ``beyond`` is committed and goes on; then kill every process of the job."""
        kill_once_committed([self.start(place, ENDLESS)], place, beyond)


def started(
    command: Sequence[str], environment: Mapping[str, str], folder: Path = ROOT
) -> subprocess.Popen[str]:
    """Start a recipe, by default from the root of the repository, as its users do."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
    )


def wait_for_commit(process: subprocess.Popen[str], place: Place, beyond: int = -1) -> None:
    """Read what rank 0 prints until a step ``beyond`` is committed and training goes on."""
    assert process.stdout is not None
    printed, told = [], Told()
    for line in process.stdout:
        printed.append(line)
        told.take(line.strip())
        if told.losses and (newest(place) or -1) > beyond:
            return
    raise AssertionError(f"the run ended by itself:\n{''.join(printed)}")


def kill_once_committed(processes: Sequence[subprocess.Popen[str]], place: Place, beyond: int = -1) -> None:
    """Kill a job of which rank 0 is in the first of these, with all that they have started, at once."""
    with killed_at_the_end(processes):
        wait_for_commit(processes[0], place, beyond)


@contextlib.contextmanager
def killed_at_the_end(processes: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    """Leave nothing of a job behind."""
    try:
        yield
    finally:
        family = [member for one in processes if one.poll() is None for member in family_of(one)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        for process in processes:
            if process.stdout is not None:
                process.stdout.close()
            process.wait()
        psutil.wait_procs(family, timeout=60)


def family_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """A process and all that it has started, itself last."""
    own = psutil.Process(process.pid)
    return [*own.children(recursive=True), own]


def finished(process: subprocess.Popen[str]) -> Told:
    """What a run printed, once it has ended well."""
    out, _ = process.communicate()
    told = Told()
    for line in out.splitlines():
        told.take(line.strip())
    assert process.returncode == 0, out
    assert told.done, out
    return told


def newest(place: Place) -> int | None:
    """The newest committed step of a run."""
    return Run(Target.parse(place.uri, **place.options)).newest()


def assert_goes_on_after_a_kill(recipe: Recipe, place: Place) -> None:
    """A killed run resumes from its newest committed step, and its losses are those of an undisturbed one."""
    run = place.child("run")
    recipe.run_until_killed(run)
    start = newest(run)
    assert start is not None
    undisturbed = recipe.start(place.child("undisturbed"), start + BEYOND)
    resumed = recipe.run(run, start + BEYOND)
    assert_went_on(start, resumed, finished(undisturbed))


def assert_went_on(start: int, resumed: Told, undisturbed: Told) -> None:
    """One run began where it was, and came to the losses that the other came to."""
    steps = len(undisturbed.losses)
    assert (undisturbed.start, list(undisturbed.losses)) == (0, list(range(1, steps + 1)))
    assert resumed.start == start < steps
    assert resumed.losses == {step: undisturbed.losses[step] for step in range(start + 1, steps + 1)}


def environment_at(place: Place) -> dict[str, str]:
    """What a user exports so that a script needs no option of the store."""
    options = {name: value for name, value in place.options.items() if name != "storage_options"}
    keys = place.options.get("storage_options", {})
    named = {"key": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY"}
    return {
        "CHECKPOINT_URI": place.uri,
        **{f"CLOUDCKPT_{name.upper()}": str(value) for name, value in options.items()},
        **{named[name]: value for name, value in keys.items() if name in named},
    }
