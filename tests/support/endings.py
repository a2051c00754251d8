"""Scripts that end in one way or another, and what they leave: processes, files, sockets, shared memory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.save.save_lease import MARKER
from cloudckpt.backends.stores import open_store
from cloudckpt.run import Run

_TAG = "CLOUDCKPT_TEST_ENDING"
_PATIENCE = 120.0
_SHM = Path("/dev/shm")  # noqa: S108 - it is listed

PRELUDE = """
import os, signal, sys, threading, time
import cloudckpt, torch
torch.set_num_threads(1)
URI = {uri!r}
state = {{"weights": torch.ones(8 << 20, dtype=torch.uint8)}}
"""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a script ended, and what there is then.

    Attributes:
        status: as the shell has it below 128, and the signal's number below zero.
        out: what it printed.
        errors: its standard error.
        steps: committed steps of its run.
        left: files in its temporary folder and in /dev/shm, and processes.
        pending: markers and open uploads of its run.
    """

    status: int
    out: str
    errors: str
    steps: list[int]
    left: list[str]
    pending: list[str]


def ended(folder: Path, body: str, how: str = "file", *, setup: str = "") -> Ending:
    """Run a script to its end: from a file, as ``-c``, on standard input, or typed into a console.

    Args:
        folder: of the run, the script and its temporary files.
        body: of the script, after `PRELUDE`.
        how: ``file``, ``-c``, ``stdin`` or ``-i``.
        setup: text before the body.
    """
    temporary, run = folder / "tmp", folder / "run"
    temporary.mkdir()
    text = PRELUDE.format(uri=str(run)) + setup + body
    command, given = [sys.executable], None
    if how == "file":
        script = folder / "train.py"
        script.write_text(text)
        command.append(str(script))
    elif how == "-c":
        command += ["-c", text]
    else:
        command += ["-i", "-q"] if how == "-i" else ["-"]
        given = text
    tag, shared = uuid.uuid4().hex, _shared()
    environment = {**os.environ, _TAG: tag, "TMPDIR": str(temporary)}
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, env=environment, timeout=_PATIENCE, check=False
    )
    left = [*map(str, temporary.iterdir()), *(_shared() - shared), *_living(tag)]
    return Ending(done.returncode, done.stdout, done.stderr, steps(run), left, pending(run))


def steps(run: Path) -> list[int]:
    """Return the committed steps of a run."""
    return Run(Target.parse(str(run))).steps()


def pending(run: Path) -> list[str]:
    """Return the markers and open uploads of a run."""
    with open_store(Target.parse(str(run))) as store:
        markers = [info.name for info in store.list().objects if MARKER.fullmatch(info.name)]
        return markers + [one.upload.name for one in store.pending_uploads()]


def _shared() -> set[str]:
    """Return what is in /dev/shm and may be of this library or of torch."""
    if not _SHM.exists():
        return set()
    return {one.name for one in _SHM.iterdir() if one.name.startswith(("cloudckpt", "torch_", "psm_"))}


def _living(tag: str) -> list[str]:
    """Return the script's processes that have not ended some seconds after it."""
    until = time.monotonic() + 10
    while found := _tagged(tag):
        if time.monotonic() > until:
            return found
        time.sleep(0.05)
    return []


def _tagged(tag: str) -> list[str]:
    found: list[str] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_TAG) == tag and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
    return found
