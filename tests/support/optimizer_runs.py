"""Starts the jobs of the optimizer matrix: one that saves, and then one of fresh processes that resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from support.optimizers import LAYOUTS, Combination, Layout, Results, Saver

TESTS = Path(__file__).resolve().parents[1]
PATIENCE = 840.0
"""Seconds that a job may take."""


def run(
    folder: Path, layout: Layout, combinations: Sequence[Combination], saver: Saver = "cloudckpt"
) -> Results:
    """Save all combinations in one job, resume them in another, and return what came of each."""
    job = {"saver": saver, "combinations": [astuple(one) for one in combinations]}
    (folder / "job.json").write_text(json.dumps(job))
    for phase in ("save", "resume"):
        _run_job(phase, folder, LAYOUTS[layout])
    outcomes = json.loads((folder / "resume-0.json").read_text())
    return dict(zip(combinations, outcomes, strict=True))


def _run_job(phase: str, folder: Path, ranks: int) -> None:
    # torchao compiles its step, which takes longer than all the rest.
    more = {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    processes = []
    try:
        for rank in range(ranks):
            with (folder / f"{phase}-{rank}.log").open("wb") as log:
                command = [
                    sys.executable,
                    "-m",
                    "support.optimizer_job",
                    phase,
                    str(folder),
                    str(rank),
                    str(ranks),
                ]
                process = subprocess.Popen(command, env={**os.environ, **more}, stdout=log, stderr=log)
            processes.append(process)
        for rank, process in enumerate(processes):
            if process.wait(PATIENCE):
                said = (folder / f"{phase}-{rank}.log").read_text()
                raise RuntimeError(f"rank {rank} ended with {process.returncode}:\n{said[-8000:]}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
