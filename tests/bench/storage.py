"""What saving and loading cost on object storage, beside other ways through DCP: part of `make bench`.

Run as `python -m bench.storage` with `tests` on the module search path. All peers use one S3 server, in
memory and in a process of its own, near and far, over TLS and without, and take turns; the first turn of each
warms up and doesn't count. What has been measured is written after each state; interrupted, it leaves nothing
else behind. The small state and the training state are measured near, over HTTP.
"""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import settings
from bench.comparison import Result, markdown, ours_beside, show
from bench.contest import Storage, measured, on_s3, scratch
from bench.distance import Distance
from bench.peers import OURS, PEERS, Opened, peers_for, set_by_environment
from bench.picture import draw
from bench.report import machine
from bench.states import Large, Shape, Small, Training
from bench.summary import summary, summary_table
from support.servers import NotInstalledError

_TENSOR = 32 << 20
"""Bytes of each of the large tensors."""
_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory; the folder in it gets a name of its own
_WIDTH = 120
"""Columns of a table, wherever it is printed to."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where cloudckpt itself failed or loaded something else than was saved."""
    return compare(parser("storage", __doc__, PEERS).parse_args(arguments), PEERS, on_s3)


def compare(
    options: argparse.Namespace,
    every: Mapping[str, Opened],
    started: Callable[[], AbstractContextManager[Storage]],
) -> int:
    """Compare the peers on a kind of storage, by the options of `parser`."""
    count = max(1, round(options.gib * (1 << 30) / _TENSOR))
    shapes: list[Shape] = [
        Large(count, _TENSOR // 4),
        Small(options.small),
        Training(options.layers, options.width),
    ]
    only = set(options.only)
    peers = {name: opened for name, opened in every.items() if name in only} or every
    named = [shape for shape in shapes if shape.name in only]
    console = Console()
    console.width = max(console.width, _WIDTH)
    with scratch(options.folder) as folder:
        facts = {**machine(folder), "repeats": options.repeats, "options": set_by_environment()}
        results: list[Result] = []
        for distance in settings.chosen(options):
            for shape in named or (shapes if distance == Distance() else shapes[:1]):
                taking_part = peers_for(shape.name, peers, distance)
                console.print(f"{distance.title}: {shape.title}, {len(taking_part)} peers", markup=False)
                try:
                    results += measured(
                        shape,
                        taking_part,
                        options.repeats,
                        folder / "state",
                        distance=distance,
                        started=started,
                    )
                except (NotInstalledError, PermissionError) as error:
                    console.print(f"not measured, {distance.title}: {error}", markup=False, soft_wrap=True)
                _write_samples(options.json, results, facts)
    show(results, facts, console)
    console.print(summary_table(results))
    _write_shown(options, results, facts)
    console.print(f"Every sample: {options.json}", markup=False, soft_wrap=True)
    return int(any(result.verdict is not None and result.peer.startswith(OURS) for result in results))


def _write_samples(path: Path, results: Sequence[Result], facts: Mapping[str, Any]) -> None:
    """Write all of it or leave what was there before."""
    written = [result.as_json(ours_beside(result, results)) for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        whole.write_text(json.dumps({"machine": facts, "results": written}, indent=1) + "\n")
        whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)


def _write_shown(options: argparse.Namespace, results: Sequence[Result], facts: Mapping[str, Any]) -> None:
    if results:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(results, options.picture)
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(f"{summary(results)}\n\n{markdown(results, facts)}")


def parser(name: str, description: str | None, peers: Mapping[str, Opened]) -> argparse.ArgumentParser:
    """Return a parser of the options of `compare`."""
    made = argparse.ArgumentParser(prog=f"bench.{name}", description=description)
    settings.add_options(made)
    made.add_argument("--gib", type=float, default=1.0, help="size of the large state (default: 1)")
    made.add_argument("--small", type=int, default=20_000, help="16 KiB tensors (default: 20000)")
    made.add_argument("--layers", type=int, default=12, help="of the transformer (default: 12)")
    made.add_argument("--width", type=int, default=512, help="of the transformer (default: 512)")
    made.add_argument("--repeats", type=int, default=3, help="turns that count (default: 3)")
    made.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=[*peers, "large", "small", "training"],
        metavar="NAME",
        help=f"peers ({'; '.join(peers)}) and states (large; small; training) to measure (default: all)",
    )
    made.add_argument(
        "--folder",
        type=Path,
        default=_MEMORY if _MEMORY.is_dir() else None,
        help="where the peer without a server saves, and where the large state lies (default: in memory)",
    )
    folder = Path("build/bench")
    made.add_argument("--json", type=Path, default=folder / f"{name}.json", help="every sample")
    made.add_argument("--picture", type=Path, default=folder / f"{name}.svg", help="bars, as SVG")
    made.add_argument("--markdown", type=Path, help="the tables, for a document")
    return made


if __name__ == "__main__":
    sys.exit(main())
