"""Recipes as their users run them: trained, killed with all their processes, and started again.

A recipe is a script in ``examples/recipes`` that takes ``--steps``, and its run from ``CHECKPOINT_URI``.
Its rank 0 prints ``from step N`` at its start, ``step N loss X`` after each step, and ``done``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cloudckpt.backends.target import Target
from cloudckpt.run import Run
from support.places import Place

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
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
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self, place: Place, steps: int) -> subprocess.Popen[str]:
        launch = [sys.executable]
        if self.ranks:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        return subprocess.Popen(
            [*launch, str(RECIPES / self.script), "--steps", str(steps)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                **_environment_of(place),
                **self.environment,
                "OMP_NUM_THREADS": "1",
                "TORCH_CPP_LOG_LEVEL": "ERROR",
            },
        )

    def run(self, place: Place, steps: int) -> Told:
        """Run to the end."""
        return finished(self.start(place, steps))

    def run_until_killed(self, place: Place) -> None:
        """Run until a step is committed and goes on; then kill every process of the job at once."""
        process = self.start(place, ENDLESS)
        assert process.stdout is not None
        printed, told = [], Told()
        for line in process.stdout:
            printed.append(line)
            told.take(line.strip())
            if told.losses and newest(place) is not None:
                break
        else:
            raise AssertionError(f"{self.script} ended by itself:\n{''.join(printed)}")
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in family:
            one.kill()
        process.stdout.close()
        process.wait()
        psutil.wait_procs(family, timeout=60)


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
    steps = start + BEYOND
    undisturbed = recipe.start(place.child("undisturbed"), steps)
    resumed = recipe.run(run, steps)
    expected = finished(undisturbed)
    assert (expected.start, sorted(expected.losses)) == (0, list(range(1, steps + 1)))
    assert resumed.start == start
    assert resumed.losses == {step: expected.losses[step] for step in range(start + 1, steps + 1)}


def _environment_of(place: Place) -> dict[str, str]:
    """What a user exports so that a script needs no option of the store."""
    options = {name: value for name, value in place.options.items() if name != "storage_options"}
    keys = place.options.get("storage_options", {})
    named = {"key": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY"}
    return {
        "CHECKPOINT_URI": place.uri,
        **{f"CLOUDCKPT_{name.upper()}": str(value) for name, value in options.items()},
        **{named[name]: value for name, value in keys.items() if name in named},
    }
