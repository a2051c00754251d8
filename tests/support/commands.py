"""The command line, run in this process, as a process in a pipe, and on a terminal of 80 columns."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed.checkpoint as dcp
from typer.testing import CliRunner

import cloudckpt
from cloudckpt.cli.app import app
from support.places import Place

COLUMNS = 80
_COMMAND = [sys.executable, "-m", "cloudckpt.cli"]


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended."""

    status: int
    out: str
    err: str = ""

    @property
    def json(self) -> Any:
        """What it printed, all of which has to be JSON."""
        return json.loads(self.out)


def run(*arguments: str, place: Place | None = None) -> Ran:
    """Run a command in this process, on the options of a place."""
    result = CliRunner().invoke(app, [*arguments, *(() if place is None else options_of(place))])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


def in_a_pipe(*arguments: str, environment: Mapping[str, str] | None = None) -> Ran:
    """Run a command as users of pipes do."""
    ran = subprocess.run(
        [*_COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**_plain_environment(), **(environment or {})},
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def on_a_terminal(*arguments: str, typed: str = "", out: int | None = None) -> Ran:
    """Run a command on a terminal of 80 columns; what it printed there, all together, is its ``out``.

    ``typed`` is there to be read from the start. ``out`` takes the standard output elsewhere.
    """
    ours, its = pty.openpty()
    environment = {**_plain_environment(), "COLUMNS": str(COLUMNS), "LINES": "50", "TERM": "xterm-256color"}
    with subprocess.Popen(
        [*_COMMAND, *arguments], stdin=its, stdout=its if out is None else out, stderr=its, env=environment
    ) as process:
        os.close(its)
        os.write(ours, typed.encode())
        printed = b""
        while True:
            try:
                data = os.read(ours, 1 << 16)
            except OSError:  # the last one has closed it
                break
            if not data:
                break
            printed += data
    os.close(ours)
    return Ran(process.returncode, printed.decode().replace("\r\n", "\n"))


def options_of(place: Place) -> list[str]:
    """What reaches a place, as it is typed."""
    typed: list[str] = []
    for name, value in place.options.items():
        typed += ["-o", f"{name}={json.dumps(value) if isinstance(value, dict) else value}"]
    return typed


def save(place: Place, state: dict[str, Any], step: int | None = None) -> Place:
    """Commit a checkpoint, of a step or at the place itself; where it is."""
    there = place if step is None else at(place, step)
    writer = cloudckpt.StorageWriter(there.uri, **there.options)
    dcp.save(state, storage_writer=writer)
    return there


def at(place: Place, step: int) -> Place:
    """Where a step is."""
    return place.child(f"step-{step:010}")


def _plain_environment() -> dict[str, str]:
    left = ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE", "GITHUB_ACTIONS", "PY_COLORS")
    return {name: value for name, value in os.environ.items() if name not in left}
