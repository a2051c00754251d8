"""Try cloudckpt on a place of your own: what `make live URI=…` runs.

Everything happens below a fresh folder of the URI, and is taken away at the end, whatever happens. First it
says what that will ask of the store, and cost. Credentials come from where the store's own tools find them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path

from rich.console import Console
from rich.table import Table

from live import benchmark
from live.prices import PRICES
from live.suites import SUITES, Asked, Suite, asked_by_benchmark
from support import live
from support.live import Live, LiveStore

_ROOT = Path(__file__).resolve().parents[2]
_BENCHMARK = "benchmark"


def main(arguments: Sequence[str] | None = None) -> int:
    """Say what will be done, do it, take it away; 1 where anything failed, 2 where nothing was to be done."""
    options = _parser().parse_args(arguments)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    suites = [suite for suite in SUITES if suite.name in options.only]
    measures = _BENCHMARK in options.only
    extent = benchmark.arguments().parse_args(options.bench.split())
    parts = {suite.name: suite.asked for suite in suites}
    if measures:
        parts[_BENCHMARK] = asked_by_benchmark(extent.gib, extent.small, extent.repeats)
    plain, mark, query = options.uri.partition("?")
    if plain.startswith("memory:"):
        console.print("memory:// is of one process, and this takes many: name a folder, a bucket or a server")
        return 2
    if "://" not in plain:
        plain = Path(plain).absolute().as_uri()
    root = f"{plain.rstrip('/')}/live-{uuid.uuid4().hex[:12]}"
    _announce(console, root, parts)
    if not (options.yes or _agreed(console)):
        return 2
    environment = {
        **os.environ,
        live.URI: f"{root}{mark}{query}",
        "PYTHONPATH": str(_ROOT / "tests"),
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else gcsfs asks each bucket's type over gRPC
    }
    steps: dict[str, list[str]] = {"doctor": ["-m", "cloudckpt.cli", "doctor", f"{root}{mark}{query}"]}
    steps |= {suite.name: _pytest(suite) for suite in suites}
    if measures:
        steps[_BENCHMARK] = ["-m", "live.benchmark", *options.bench.split()]
    try:
        failed = _all_of(console, steps, environment)
    finally:
        left = _take_away(f"{root}{mark}{query}")
    console.print(f"==> below {root} nothing is left" if not left else f"==> {root} still has {left}")
    console.print(f"==> failed: {', '.join(failed)}" if failed else "==> all of it passed")
    return 1 if failed or left else 0


def _announce(console: Console, root: str, parts: dict[str, Asked]) -> None:
    table = Table(title=f"What is tried below {root}", title_justify="left")
    for column in ("", "writes, lists", "reads", "GiB up", "GiB down"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    sum_ = reduce(add, parts.values(), Asked())
    for name, asked in {**parts, "in all, about": sum_}.items():
        table.add_row(
            name, f"{asked.writing:,}", f"{asked.reading:,}", f"{asked.up:.1f}", f"{asked.down:.1f}"
        )
    console.print(table)
    for suite in SUITES:
        console.print(f"  {suite.name}: {suite.what}" + ("" if suite.name in parts else " (not asked for)"))
    prices = PRICES.get("gs" if root.startswith("gcs:") else root.partition(":")[0])
    if prices is None:
        console.print("It costs nothing where nobody bills for the store.")
        return
    console.print(
        f"At list prices ({prices.store}): ${prices.requests(sum_):.2f} for requests, and "
        f"${prices.outward(sum_):.2f} for bytes that leave the cloud, if you run this outside of it. "
        f"Whatever is left behind costs at most ${prices.left_for_a_day(sum_):.2f} a day."
    )


def _agreed(console: Console) -> bool:
    if not sys.stdin.isatty():
        return True  # who starts it in a pipe has decided
    return console.input("Go on? [y/N] ").strip().lower() in {"y", "yes"}


def _pytest(suite: Suite) -> list[str]:
    # Not the settings of a usual run: one process, in order, with a word on each test that was left out.
    return [
        "-m",
        "pytest",
        "-q",
        "-rsx",
        *(["-m", "soak", "--timeout=7200"] if suite.long else ["--timeout=600"]),
        "-k",
        "live",
        *(f"tests/{file}" for file in suite.files),
    ]


def _all_of(console: Console, steps: dict[str, list[str]], environment: dict[str, str]) -> list[str]:
    """Names of the steps that failed. Where a job can't checkpoint at all, the rest is not tried."""
    failed = []
    for name, command in steps.items():
        console.print(f"==> {name}")
        ended = subprocess.run([sys.executable, *command], cwd=_ROOT, env=environment, check=False)
        if ended.returncode:
            failed.append(name)
            if name == "doctor":
                console.print("==> the rest was not tried")
                break
    return failed


def _take_away(uri: str) -> int:
    """Remove all that is left, and count what is there after that."""
    store, plain = LiveStore.of(uri)
    below = Live(store, plain)
    below.clear()
    return len(below.visible() | below.pending())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="live", description=__doc__)
    names = [*(suite.name for suite in SUITES), _BENCHMARK]
    usual = [*(suite.name for suite in SUITES if not suite.long), _BENCHMARK]
    parser.add_argument("uri", help="s3://bucket/prefix, gs://bucket/prefix or file:///folder, with options")
    parser.add_argument("--yes", action="store_true", help="don't ask")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=usual, metavar="PART", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--bench", default="", help="how much the benchmark moves: '--gib 2 --repeats 5'")
    return parser


if __name__ == "__main__":
    sys.exit(main())
