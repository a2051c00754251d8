"""What saving and loading take at the place that a user has named, beside stock DCP: a part of `make live`.

Run as `python -m live.benchmark` with `tests` on the module search path and the place in CLOUDCKPT_LIVE_URI.
"""

from __future__ import annotations

import sys
import tempfile
import uuid
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from bench.report import machine
from bench.turns import Form, parser, run
from support.places import Place
from support.shortcomings import why_stock_cannot_write_to

OURS, STOCK = "cloudckpt", "stock DCP"


def arguments() -> ArgumentParser:
    """How much is moved, how often."""
    return parser("live", __doc__, gib=0.5, small=200, repeats=2)


def forms(place: Place) -> Mapping[str, Form]:
    """Return both forms, or cloudckpt's alone where stock DCP cannot save. Each saves to fresh names.

    Options are of each form's own choice but for where the store is.
    """
    options = {name: value for name, value in place.options.items() if name != "part_size"}
    ours, stock = (replace(place.child(form), options=options) for form in ("ours", "stock"))
    found = {OURS: Form(lambda name: ours.child(name).writer(), lambda name: ours.child(name).reader())}
    if not why_stock_cannot_write_to(place):
        found[STOCK] = Form(
            lambda name: stock.child(name).stock_writer(sync_files=False),
            lambda name: stock.child(name).stock_reader(),
        )
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = arguments().parse_args(given)
    root = Place.named_by_the_user()
    facts = {**machine(Path(tempfile.gettempdir())), "uri": root.uri}
    console = Console()
    if reason := why_stock_cannot_write_to(root):
        console.print(f"stock DCP cannot save here: {reason}", markup=False, soft_wrap=True)
    console.print(f"{facts['cores']} cores ({facts['processor']}), {root.uri}", markup=False, soft_wrap=True)
    run(lambda: forms(root.child(f"bench-{uuid.uuid4().hex[:8]}")), options, facts, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
