"""What the samples come to: medians and ratios, on the terminal and in a file."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.trainer import Sample, Shape


@dataclass(frozen=True, slots=True)
class Result:
    """A form on a state: its samples, or why it could not save."""

    shape: Shape
    form: str
    samples: Sequence[Sample]
    failure: str | None = None

    def figures(self) -> dict[str, float]:
        """Medians over the saves, and percentiles over all their steps."""
        if self.failure is not None:
            return {}
        samples = self.samples
        figures = {
            "blocked_ms": statistics.median(sample.blocked_ms for sample in samples),
            "bare_copy_ms": statistics.median(sample.bare_ms for sample in samples),
            "blocked_ratio": statistics.median(sample.blocked_ms / sample.bare_ms for sample in samples),
            "save_ms": statistics.median(sample.save_ms for sample in samples),
        }
        saving = [step for sample in samples for step in sample.saving_ms]
        idle = [step for sample in samples for step in sample.idle_ms]
        if saving:
            figures["steps"] = len(saving)
            for percent in (50, 99):
                beside, without = percentile(saving, percent), percentile(idle, percent)
                figures[f"step_p{percent}_ms"] = without
                figures[f"step_p{percent}_saving_ms"] = beside
                figures[f"step_p{percent}_ratio"] = beside / without
        return figures

    def as_json(self) -> dict[str, Any]:
        return {
            "state": {**asdict(self.shape), "bytes": self.shape.nbytes},
            "form": self.form,
            "failure": self.failure,
            "figures": self.figures(),
            "samples": [asdict(sample) for sample in self.samples],
        }


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent of the values don't exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


def machine(folder: Path) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": _processor(),
        "load": os.getloadavg()[0],
        "file_system": _file_system(folder),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _file_system(folder: Path) -> str:
    mounts = Path("/proc/mounts")
    kinds = {
        Path(fields[1]): fields[2]
        for line in (mounts.read_text().splitlines() if mounts.exists() else [])
        if len(fields := line.split()) > 2
    }
    return next((kinds[above] for above in (folder, *folder.parents) if above in kinds), "unknown")


def show(results: Sequence[Result], facts: dict[str, Any], console: Console) -> None:
    """Print both tables, and what could not be measured."""
    console.print(
        f"{facts['cores']} cores ({facts['processor']}), load {facts['load']:.1f} at the start, "
        f"device: {facts['device']}\n"
        f"Saving to {facts['file_system']}, Python {facts['python']}, torch {facts['torch']}"
    )
    blocked = _table(
        "What a save blocks the caller", "state", "form", "blocked ms", "bare copy ms", "ratio", "save ms"
    )
    steps = _table(
        "A training step without a save and beside one",
        *("form", "p50 ms", "saving", "ratio", "p99 ms", "saving", "ratio", "steps"),
    )
    for result in results:
        if result.failure is not None:
            blocked.add_row(result.shape.name, result.form, "failed")
            continue
        figures = result.figures()
        blocked.add_row(
            result.shape.name,
            result.form,
            *(f"{figures[name]:.1f}" for name in ("blocked_ms", "bare_copy_ms")),
            f"{figures['blocked_ratio']:.2f}",
            f"{figures['save_ms']:.0f}",
        )
        if result.shape.steps:
            steps.add_row(
                result.form,
                *(
                    f"{figures[f'step_p{percent}_{name}']:.2f}"
                    for percent in (50, 99)
                    for name in ("ms", "saving_ms", "ratio")
                ),
                f"{figures['steps']:.0f}",
            )
    console.print(blocked)
    console.print(steps)
    for result in results:
        if result.failure is not None:
            console.print(f"{result.form} failed on {result.shape.name}: {result.failure}", markup=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in {"state", "form"} else "right", no_wrap=True)
    return table
