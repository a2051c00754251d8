"""The storage comparison as a picture: bars of wall time and CPU for the first state, over TLS where it
was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.comparison import Result
from bench.peers import FLOOR, OURS

_FIGURES = {"seconds": "wall, s", "cpu_seconds_per_gib": "client CPU, s a GiB"}
_HEADLINE = "90 MB/s, TLS"
"""Of the setting that is shown, if it was measured; else the first is."""
_OUR_COLOUR, _FLOOR_COLOUR, _COLOUR = "#1b6ca8", "#9aa5ad", "#d9a441"


def draw(results: Sequence[Result], path: Path) -> None:
    """Write the picture as SVG, whose text stays text; the same figures make the same file."""
    settings = [result.setting for result in results if result.state == results[0].state]
    setting = next((setting for setting in settings if _HEADLINE in setting), settings[0])
    shown = [result for result in results if (result.state, result.setting) == (results[0].state, setting)]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cloudckpt", "font.family": "sans-serif"}):
        figure = Figure(figsize=(9, 5), layout="constrained")
        figure.suptitle(f"{shown[0].title}, {setting}")
        axes = figure.subplots(2, 2, squeeze=False)
        for row, figure_name in zip(axes, _FIGURES, strict=True):
            for axis, what in zip(row, ("save", "load"), strict=True):
                _bars(axis, [result for result in shown if result.what == what], figure_name)
                axis.set_title(f"{what}: {_FIGURES[figure_name]}", fontsize=10)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _bars(axis: Axes, results: Sequence[Result], name: str) -> None:
    labels = [
        result.peer if result.verdict is None else f"{result.peer} (doesn't load)" for result in results
    ]
    values = [result.figures(None).get(name, 0.0) for result in results]
    # Unclipped, because a clip is named by where in memory it lies.
    bars = axis.barh(labels, values, color=[_colour(result.peer) for result in results], clip_on=False)
    axis.bar_label(bars, [f"{value:.2f}" if value else "" for value in values], padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _colour(peer: str) -> str:
    if peer.startswith(OURS):
        return _OUR_COLOUR
    return _FLOOR_COLOUR if peer == FLOOR else _COLOUR
