"""What the samples of the storage comparison come to: medians and paired ratios, and the tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.peers import CURL, FLOOR, FOLDER, OURS
from bench.worker import Spent, What

_GIB = 1 << 30
_MIB = 1 << 20
_NONE = "-"
"""Where there is no figure."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One save or load: what it took of the client, and what passed at the server meanwhile."""

    spent: Spent
    requests: Mapping[str, int]
    received: int
    """Bytes of bodies that the server got."""
    sent: int
    """Bytes of bodies that the server gave."""
    server_cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """A peer on a state, one way: its samples, or why it has none."""

    state: str
    title: str
    nbytes: int
    what: What
    peer: str
    samples: Sequence[Sample]
    failure: str | None = None
    sound: bool = True
    """Whether all that the peer saved was loaded again, bit for bit."""
    setting: str = "near, HTTP"
    """How far away the server was, and how it was spoken to."""

    @property
    def wrong(self) -> list[str]:
        """What it loaded and isn't what was saved, in any of the samples."""
        return sorted({name for sample in self.samples for name in sample.spent.wrong})

    @property
    def verdict(self) -> str | None:
        """Why its figures don't count, or None where they do."""
        if self.failure is not None:
            return f"failed: {self.failure}"
        if self.wrong:
            return f"loads wrongly: {len(self.wrong)} values, {self.wrong[0]} one of them"
        return None if self.sound else "what it saved doesn't load as it was"

    def figures(self, ours: Result | None) -> dict[str, float]:
        """Medians, and medians of the ratios to ours in the same turn. Empty for a peer that failed."""
        if self.failure is not None or not self.samples:
            return {}
        gib = self.nbytes / _GIB
        seconds = [sample.spent.seconds for sample in self.samples]
        cpu = [sample.spent.cpu_seconds for sample in self.samples]
        moved = [sample.received if self.what == "save" else sample.sent for sample in self.samples]
        figures = {
            "seconds": statistics.median(seconds),
            "cpu_seconds_per_gib": statistics.median(cpu) / gib,
            "extra_mib": statistics.median(sample.spent.extra_bytes for sample in self.samples) / _MIB,
            "requests": statistics.median(sum(sample.requests.values()) for sample in self.samples),
            "amplification": statistics.median(moved) / self.nbytes,
        }
        if ours is not None and ours.failure is None:
            figures["seconds_to_ours"] = paired_ratio(
                seconds, [sample.spent.seconds for sample in ours.samples]
            )
            figures["cpu_to_ours"] = paired_ratio(cpu, [sample.spent.cpu_seconds for sample in ours.samples])
        return figures

    def as_json(self, ours: Result | None) -> dict[str, Any]:
        return {
            **{
                name: getattr(self, name)
                for name in ("state", "title", "nbytes", "what", "peer", "failure", "sound", "setting")
            },
            "wrong": self.wrong,
            "figures": self.figures(ours),
            "samples": [asdict(sample) for sample in self.samples],
        }


def paired_ratio(values: Sequence[float], ours: Sequence[float]) -> float:
    """Median of the ratios of what was measured in the same turn."""
    return statistics.median(value / our for value, our in zip(values, ours, strict=True))


def ours_beside(result: Result, results: Sequence[Result]) -> Result | None:
    """cloudckpt's own result of the same state and direction."""
    same = (OURS, result.state, result.what, result.setting)
    return next(
        (other for other in results if (other.peer, other.state, other.what, other.setting) == same), None
    )


def best_peer(results: Sequence[Result], what: What, state: str) -> Result | None:
    """The fastest that used the server and whose figures count, cloudckpt itself and the yardsticks aside.

    The results are those of one setting.
    """
    able = [
        result
        for result in results
        if (result.what, result.state) == (what, state)
        and result.verdict is None
        and result.peer not in {CURL, FLOOR, FOLDER}
        and not result.peer.startswith(OURS)
    ]
    return min(able, key=lambda result: result.figures(None)["seconds"], default=None)


COLUMNS = ("wall s", "CPU s/GiB", "extra MiB", "requests", "bytes", "wall", "CPU")
"""``bytes``: that passed the wire, for one of the tensors; the last two are ratios to ours."""


def cells(figures: Mapping[str, float]) -> list[str]:
    """The figures as they are shown, in the order of ``COLUMNS``."""
    if not figures:
        return [_NONE] * len(COLUMNS)
    served = figures["requests"] > 0
    return [
        f"{figures['seconds']:.2f}",
        f"{figures['cpu_seconds_per_gib']:.2f}",
        f"{figures['extra_mib']:.0f}",
        f"{figures['requests']:.0f}" if served else _NONE,
        f"{figures['amplification']:.2f}" if served else _NONE,
        *(
            f"{figures[name]:.2f}" if name in figures else _NONE
            for name in ("seconds_to_ours", "cpu_to_ours")
        ),
    ]


def show(results: Sequence[Result], facts: Mapping[str, Any], console: Console) -> None:
    """Print a table for each state and direction, and what went wrong."""
    console.print(_about(facts), markup=False, soft_wrap=True)
    for title, rows in _tables(results).items():
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for column in ("", *COLUMNS[:-2], "wall/ours", "CPU/ours"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for result in rows:
            mark = "" if result.verdict is None else " (!)"
            table.add_row(result.peer + mark, *cells(result.figures(ours_beside(result, results))))
        console.print(table)
        best = best_peer(rows, rows[0].what, rows[0].state)
        if best is not None:
            console.print(f"  fastest peer on the server that does it correctly: {best.peer}\n", markup=False)
    for result in results:
        if result.verdict is not None:
            told = f"(!) {_named(result)}: {result.verdict}"
            console.print(told, markup=False, soft_wrap=True)


def markdown(results: Sequence[Result], facts: Mapping[str, Any]) -> str:
    """The same tables for a document."""
    parts = [_about(facts)]
    for title, rows in _tables(results).items():
        parts += [f"**{title}**", "\n".join(_markdown_table(rows, results))]
    wrongs = [f"- {_named(result)}: {result.verdict}" for result in results if result.verdict is not None]
    return "\n\n".join([*parts, *(["\n".join(wrongs)] if wrongs else [])]) + "\n"


def _named(result: Result) -> str:
    return f"{result.peer}, {result.what} of {result.title}, {result.setting}"


def _markdown_table(rows: Sequence[Result], results: Sequence[Result]) -> list[str]:
    lines = [
        "| | " + " | ".join([*COLUMNS[:-2], "wall ÷ ours", "CPU ÷ ours"]) + " |",
        "| --- |" + " --: |" * len(COLUMNS),
    ]
    for result in rows:
        mark = "" if result.verdict is None else " (!)"
        shown = cells(result.figures(ours_beside(result, results)))
        lines.append(f"| {result.peer}{mark} | " + " | ".join(shown) + " |")
    return lines


def _tables(results: Sequence[Result]) -> dict[str, list[Result]]:
    tables: dict[str, list[Result]] = {}
    for result in results:
        tables.setdefault(f"{result.what.capitalize()}, {result.setting}: {result.title}", []).append(result)
    return tables


def _about(facts: Mapping[str, Any]) -> str:
    options = "".join(f", {name}={value}" for name, value in facts["options"].items())
    return (
        f"{facts['cores']} cores ({facts['processor']}), load {facts['load']:.1f} at the start, "
        f"Python {facts['python']}, torch {facts['torch']}; {facts['repeats']} repeats; a server in "
        f"memory on the same machine; `folder` on {facts['file_system']}{options}"
    )
