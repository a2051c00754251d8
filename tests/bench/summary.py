"""The headline of a storage comparison: one line a setting and direction, for the large state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from bench.comparison import Result
from bench.peers import CURL, FLOOR, FOLDER, LIMITED, OURS

_STATE = "large"
_MIB = 1 << 20
_ASIDE = {LIMITED, FLOOR, FOLDER}
"""What has no column: neither a peer nor over the network."""
_NONE = "-"


def summary(results: Sequence[Result]) -> str:
    """Return the headline as a Markdown table: MiB/s, and the client's CPU seconds a GiB."""
    columns = _columns(results)
    lines = ["| " + " | ".join(columns) + " |", "| --- | --- |" + " --: |" * (len(columns) - 2)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in _rows(results))])


def summary_table(results: Sequence[Result]) -> Table:
    """Return the headline for a terminal."""
    title = "MiB/s at the client's CPU seconds a GiB; (!) does not load what it saved"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for number, column in enumerate(_columns(results)):
        table.add_column(column, justify="right" if number > 1 else "left")
    for row in _rows(results):
        table.add_row(*row)
    return table


def _shown(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if result.state == _STATE and result.peer not in _ASIDE]


def _peers(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.peer for result in _shown(results)))


def _columns(results: Sequence[Result]) -> list[str]:
    return ["setting", "", *_peers(results), "speed to the best peer", "CPU to the least"]


def _rows(results: Sequence[Result]) -> Iterator[list[str]]:
    shown = _shown(results)
    for setting in dict.fromkeys(result.setting for result in shown):
        for what in ("save", "load"):
            row = {
                result.peer: result for result in shown if (result.setting, result.what) == (setting, what)
            }
            yield [
                setting, what,
                *(_cell(row.get(peer)) for peer in _peers(results)),
                *_ratios(row),
            ]  # fmt: skip


def _cell(result: Result | None) -> str:
    figures = {} if result is None else result.figures(None)
    if result is None or not figures:
        return _NONE
    mark = "" if result.sound else " (!)"
    return f"{_speed(result):.0f} at {figures['cpu_seconds_per_gib']:.2f}{mark}"


def _speed(result: Result) -> float:
    return result.nbytes / _MIB / result.figures(None)["seconds"]


def _ratios(row: dict[str, Result]) -> list[str]:
    """Return our speed over the fastest peer's, and our CPU over that of the peer that needs least.

    A peer counts even if its saves don't load: its speed is real. curl is no peer.
    """
    ours = row.get(OURS)
    others = [result for peer, result in row.items() if peer not in {OURS, CURL} and result.figures(None)]
    if ours is None or not ours.figures(None) or not others:
        return [_NONE, _NONE]
    fastest = max(_speed(other) for other in others)
    least = min(other.figures(None)["cpu_seconds_per_gib"] for other in others)
    return [f"{_speed(ours) / fastest:.2f}", f"{ours.figures(None)['cpu_seconds_per_gib'] / least:.2f}"]
