"""A process that loads a step of a run, and waits between ``.metadata`` and the data until it may go on.

Run as ``python -m support.slow_reader URI OPTIONS STEP READY GO``: the options as JSON, the step or
``newest``, and two files. It makes READY once it has read ``.metadata``, reads the data when GO is there, and
prints what it has loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cloudckpt import Checkpointer, StorageReader
from support.executors import until
from support.places import Place

_TESTS = Path(__file__).parent.parent
_PATIENCE = 120.0
"""Seconds that each side waits for the other."""


class SlowReader:
    """A reader that was started, from the outside."""

    def __init__(self, process: subprocess.Popen[str], go: Path) -> None:
        self.process, self._go = process, go

    def finish(self) -> str:
        """Have it read the data; returns what it printed."""
        self._go.touch()
        printed, said = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, said
        return printed.strip()


@contextlib.contextmanager
def reading(place: Place, step: str, folder: Path) -> Iterator[SlowReader]:
    """Start a reader and wait until it has read ``.metadata``."""
    ready, go = folder / f"ready-{step}", folder / f"go-{step}"
    arguments = [place.uri, json.dumps(place.options), step, str(ready), str(go)]
    process = subprocess.Popen(
        [sys.executable, "-m", "support.slow_reader", *arguments],
        env=os.environ | {"PYTHONPATH": str(_TESTS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: ready.exists() or process.poll() is not None, _PATIENCE)
        assert ready.exists(), process.communicate()[1]
        yield SlowReader(process, go)
    finally:
        process.kill()
        process.communicate()


def main(uri: str, options: str, step: str, ready: str, go: str) -> None:
    """Load a step slowly."""
    read_data = StorageReader.read_data

    def waiting(self: StorageReader, *args: Any) -> Any:
        Path(ready).touch()
        until(Path(go).exists, _PATIENCE)
        return read_data(self, *args)

    StorageReader.read_data = waiting  # type: ignore[assignment,method-assign]
    state = {"t": torch.zeros(1000)}
    checkpointer = Checkpointer(uri, preemption_grace=None, progress=False, **json.loads(options))
    print(checkpointer.load(state, None if step == "newest" else int(step)), sorted(set(state["t"].tolist())))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
