"""What saving and loading cost on object storage, beside other ways through DCP: part of `make bench`.

Run as `python -m bench.storage` with `tests` on the module search path. All peers use one S3 server, in
memory and in a process of its own, and take turns; the first turn of each warms up and doesn't count. What
has been measured is written after each state; interrupted, it leaves nothing else behind.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from bench.comparison import Result, Sample, markdown, ours_beside, show
from bench.endpoint import Endpoint, served
from bench.peers import OURS, PEERS, Opened, Place, peers_for, set_by_environment
from bench.picture import draw
from bench.report import machine
from bench.states import Large, Shape, Small, Training
from bench.worker import What, Worker, WorkerFailed
from support.servers import S3Server

_TENSOR = 32 << 20
"""Bytes of each of the large tensors."""
_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory; the folder in it gets a name of its own
_WIDTH = 100
"""Columns of a table, wherever it is printed to."""
_WAYS: tuple[What, ...] = ("save", "load")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where cloudckpt itself failed or loaded something else than was saved."""
    options = _parser().parse_args(arguments)
    count = max(1, round(options.gib * (1 << 30) / _TENSOR))
    shapes: list[Shape] = [
        Large(count, _TENSOR // 4),
        Small(options.small),
        Training(options.layers, options.width),
    ]
    only = set(options.only)
    peers = {name: opened for name, opened in PEERS.items() if name in only} or PEERS
    shapes = [shape for shape in shapes if shape.name in only] or shapes
    console = Console()
    console.width = max(console.width, _WIDTH)
    with _scratch(options.folder) as folder:
        facts = {**machine(folder), "repeats": options.repeats, "options": set_by_environment()}
        results: list[Result] = []
        for shape in shapes:
            with console.status(shape.title):
                results += measured(shape, peers_for(shape.name, peers), options.repeats, folder / shape.name)
            _write_samples(options.json, results, facts)
    show(results, facts, console)
    _write_shown(options, results, facts)
    console.print(f"Every sample: {options.json}", markup=False, soft_wrap=True)
    return int(any(result.verdict is not None and result.peer.startswith(OURS) for result in results))


@contextmanager
def _scratch(parent: Path | None) -> Iterator[Path]:
    """Make a folder that is gone in the end, if need be because of Ctrl-C or SIGTERM: then what runs ends."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ignore() -> None:
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)

    def end(number: int, _frame: FrameType | None) -> None:
        ignore()  # a second one would interrupt the clearing away
        sys.exit(128 + number)

    folder = (parent or Path(tempfile.gettempdir())) / f"cloudckpt-bench-{uuid.uuid4().hex[:12]}"
    try:
        for number in handlers:
            signal.signal(number, end)
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        ignore()
        for worker in multiprocessing.active_children():  # one that was interrupted as it began
            worker.kill()
            worker.join()
        if folder.exists():
            shutil.rmtree(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def measured(shape: Shape, peers: Mapping[str, Opened], repeats: int, folder: Path) -> list[Result]:
    """Have each peer save the state and load it, turn by turn, on a server of its own that all share."""
    folder.mkdir()
    shape.lay(folder)
    with served() as endpoint, ExitStack() as stack:
        contest = _Contest(endpoint)
        for name, opened in peers.items():
            place = Place(endpoint.server, endpoint.server.new_bucket(), folder / name.replace(" ", "-"))
            contest.enter(name, place, stack.enter_context(Worker(opened, place, shape, folder)))
        for turn in range(1 + repeats):
            contest.take_turns(turn)
    shutil.rmtree(folder)
    return list(contest.results(shape))


class _Contest:
    """The workers of one state, and what they were measured at."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._workers: dict[str, tuple[Place, Worker]] = {}
        self._samples: dict[tuple[str, What], list[Sample]] = {}
        self._failures: dict[tuple[str, What], str] = {}
        self._nbytes = 0

    def enter(self, name: str, place: Place, worker: Worker) -> None:
        self._workers[name] = place, worker

    def take_turns(self, turn: int) -> None:
        """Have each that still can save and load once; another one goes first each time."""
        names = list(self._workers)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for what in _WAYS:
                self._take(name, what, turn)
            _clear(self._workers[name][0])

    def _take(self, name: str, what: What, turn: int) -> None:
        """Measure once, unless it has failed before. What couldn't be saved can't be loaded."""
        if {(name, what), (name, "save")} & self._failures.keys():
            return
        _, worker = self._workers[name]
        try:
            if not turn and what == "save":
                self._nbytes = worker.ready()
            sample = self._sample(worker, what, f"turn-{turn}")
        except WorkerFailed as failed:
            self._failures[name, what] = str(failed)
        else:
            self._samples.setdefault((name, what), []).append(sample)

    def _sample(self, worker: Worker, what: What, name: str) -> Sample:
        self._endpoint.reset()
        spent = worker.measure(what, name)
        counts = self._endpoint.counts()
        return Sample(spent, counts.requests, counts.received, counts.sent, counts.cpu_seconds)

    def results(self, shape: Shape) -> Iterator[Result]:
        for what in _WAYS:
            for name in self._workers:
                samples = self._samples.get((name, what), [])[1:]
                failure = self._failures.get((name, what)) or self._failures.get((name, "save"))
                yield Result(
                    *(shape.name, shape.title, self._nbytes, what, name, samples, failure),
                    sound=self._is_sound(name),
                )

    def _is_sound(self, name: str) -> bool:
        loads = self._samples.get((name, "load"), [])
        return (name, "load") not in self._failures and not any(sample.spent.wrong for sample in loads)


def _clear(place: Place) -> None:
    """Remove what a peer has saved, so that the next finds as much memory."""
    _empty(place.server, place.bucket)
    for saved in place.folder.iterdir():
        if saved.is_dir():
            shutil.rmtree(saved)


def _empty(server: S3Server, bucket: str) -> None:
    client = server.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for found in page.get("Contents", []):
            client.delete_object(Bucket=bucket, Key=found["Key"])  # pyright: ignore[reportTypedDictNotRequiredAccess]


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
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(results, options.picture)
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(markdown(results, facts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.storage", description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the large state (default: 2)")
    parser.add_argument("--small", type=int, default=20_000, help="16 KiB tensors (default: 20000)")
    parser.add_argument("--layers", type=int, default=12, help="of the transformer (default: 12)")
    parser.add_argument("--width", type=int, default=512, help="of the transformer (default: 512)")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count (default: 5)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=[*PEERS, "large", "small", "training"],
        metavar="NAME",
        help=f"peers ({'; '.join(PEERS)}) and states (large; small; training) to measure (default: all)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=_MEMORY if _MEMORY.is_dir() else None,
        help="where the peer without a server saves, and where the large state lies (default: in memory)",
    )
    parser.add_argument("--json", type=Path, default=Path("build/bench/storage.json"), help="every sample")
    parser.add_argument("--picture", type=Path, default=Path("build/bench/storage.svg"), help="bars, as SVG")
    parser.add_argument("--markdown", type=Path, help="the tables, for a document")
    return parser


if __name__ == "__main__":
    sys.exit(main())
