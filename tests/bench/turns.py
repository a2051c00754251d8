"""Forms that save and load the same state through DCP by turns, and the table of what that took."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table

Way = Literal["save", "load"]
WAYS: tuple[Way, ...] = ("save", "load")
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Form:
    """A way to save to a name and to load from it, and where the tensors are."""

    writer: Callable[[str], dcp.StorageWriter]
    reader: Callable[[str], dcp.StorageReader]
    device: str = "cpu"
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True, slots=True)
class State:
    """So many float32 tensors of one size."""

    title: str
    tensors: int
    elements: int

    @property
    def gib(self) -> float:
        return 4 * self.tensors * self.elements / _GIB

    def make(self, device: str) -> dict[str, torch.Tensor]:
        return {f"t{number}": torch.rand(self.elements, device=device) for number in range(self.tensors)}


def usual_states(gib: float, small: int) -> list[State]:
    """Large tensors and small ones."""
    return [
        State(f"{gib:g} GiB in 32 MiB tensors", round(gib * 32), 8 << 20),
        State(f"{small} x 16 KiB", small, 4096),
    ]


@dataclass(frozen=True, slots=True)
class Sample:
    """One save or load."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds of this process, on all its threads."""


Samples = dict[str, dict[Way, list[Sample]]]


def measured(forms: Mapping[str, Form], state: State, repeats: int) -> Samples:
    """Have each form save and load, by turns; the first turn doesn't count.

    Raises:
        AssertionError: something else was loaded than was saved.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    devices = {form.device for form in forms.values()}
    saved = {device: state.make(device) for device in devices}
    loaded = {device: state.make(device) for device in devices}
    samples: Samples = {name: {way: [] for way in WAYS} for name in forms}
    for turn, (name, form) in itertools.product(range(1 + repeats), forms.items()):
        here, there = saved[form.device], loaded[form.device]
        for tensor in there.values():
            tensor.zero_()
        with form.within():
            writer = form.writer(f"turn-{turn}")
            saving = _timed(lambda: dcp.save(here, storage_writer=writer, no_dist=True))  # noqa: B023 - called at once
            reader = form.reader(f"turn-{turn}")
            loading = _timed(lambda: dcp.load(there, storage_reader=reader, no_dist=True))  # noqa: B023
        assert all(torch.equal(there[key], tensor) for key, tensor in here.items()), name
        if turn:
            samples[name]["save"].append(saving)
            samples[name]["load"].append(loading)
    return samples


def _timed(task: Callable[[], object]) -> Sample:
    _synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    task()
    _synchronize()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(
    forms: Callable[[], Mapping[str, Form]],
    options: argparse.Namespace,
    facts: Mapping[str, Any],
    console: Console,
) -> None:
    """Measure the usual states by what ``parser`` has read, print a table of each, and write every sample."""
    written: dict[str, Any] = {"machine": facts}
    for state in usual_states(options.gib, options.small):
        samples = measured(forms(), state, options.repeats)
        console.print(table(state, samples))
        written[state.title] = as_json(samples)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(written, indent=1) + "\n")


def parser(
    name: str, description: str | None, *, gib: float, small: int, repeats: int
) -> argparse.ArgumentParser:
    """Arguments of ``bench.<name>``, with these defaults."""
    made = argparse.ArgumentParser(prog=f"bench.{name}", description=description)
    made.add_argument("--gib", type=float, default=gib, help=f"size of the large state (default: {gib:g})")
    made.add_argument("--small", type=int, default=small, help=f"16 KiB tensors (default: {small})")
    made.add_argument("--repeats", type=int, default=repeats, help=f"turns that count (default: {repeats})")
    made.add_argument("--json", type=Path, default=Path(f"build/bench/{name}.json"), help="every sample")
    return made


def table(state: State, samples: Samples) -> Table:
    """Medians."""
    shown = Table(title=state.title, title_justify="left")
    for column in ("", "save s", "CPU s/GiB", "load s", "CPU s/GiB"):
        shown.add_column(column, justify="right" if column else "left", no_wrap=True)
    for form, ways in samples.items():
        shown.add_row(form, *itertools.chain.from_iterable(_cells(ways[way], state.gib) for way in WAYS))
    return shown


def _cells(samples: Iterable[Sample], gib: float) -> Sequence[str]:
    taken = list(samples)
    wall, cpu = (
        statistics.median(values) for values in zip(*((one.wall, one.cpu) for one in taken), strict=True)
    )
    return f"{wall:.2f}", f"{cpu / gib:.2f}"


def as_json(samples: Samples) -> dict[str, dict[Way, list[dict[str, float]]]]:
    """Every sample."""
    return {
        form: {way: [asdict(one) for one in taken] for way, taken in ways.items()}
        for form, ways in samples.items()
    }
