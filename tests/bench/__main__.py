"""What saving in the background costs training, beside DCP's own forms and a bare copy: `make bench`.

Run as `python -m bench` with `tests` on the module search path.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from bench.forms import FORMS
from bench.report import Result, machine, show
from bench.trainer import Sample, Shape, Trainer, TrainerFailed, rounds_of

_STEP = 15.0
"""Milliseconds that a training step is to take."""
_SMALL = 16 << 10
"""Bytes of each of the many small tensors."""
_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory; the folder in it gets a name of its own


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where cloudckpt itself could not save."""
    options = _parser().parse_args(arguments)
    large = round(options.gib * (1 << 30) / options.tensors)
    shapes = [
        Shape(
            f"{options.tensors} x {_size(large)}", options.tensors, max(1, large // 4), True, options.device
        ),
        Shape(f"{options.small} x {_size(_SMALL)}", options.small, _SMALL // 4, False, options.device),
    ]
    console = Console()
    with tempfile.TemporaryDirectory(prefix="cloudckpt-bench-", dir=options.folder) as name:
        folder = Path(name)
        facts = machine(folder)
        results = list(_compare(shapes, options.repeats, rounds_of(_STEP, options.device), folder))
    show(results, facts, console)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    written = {"machine": facts, "results": [result.as_json() for result in results]}
    options.json.write_text(json.dumps(written, indent=1) + "\n")
    console.print(f"Every sample: {options.json}", markup=False, soft_wrap=True)
    return int(any(result.failure is not None and result.form == "cloudckpt" for result in results))


def _compare(shapes: Sequence[Shape], repeats: int, rounds: int, folder: Path) -> Iterator[Result]:
    """Have each form save in a process of its own, turn by turn; the first save of a state doesn't count."""
    failures: dict[str, str] = {}
    device = shapes[0].device
    with ExitStack() as stack:
        trainers = {
            form: stack.enter_context(Trainer(form, rounds, folder / form.replace(" ", "-"), device))
            for form in FORMS
        }
        for shape in shapes:
            samples: dict[str, list[Sample]] = {form: [] for form in FORMS}
            for _, form in itertools.product(range(1 + repeats), FORMS):
                if form in failures:
                    continue
                try:
                    samples[form].append(trainers[form].measure(shape))
                except TrainerFailed as failed:
                    failures[form] = str(failed)
            yield from (Result(shape, form, samples[form][1:], failures.get(form)) for form in FORMS)


def _size(nbytes: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1 << 10 or unit == "GiB":
            break
        nbytes //= 1 << 10
    return f"{nbytes} {unit}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the large state (default: 1)")
    parser.add_argument("--tensors", type=int, default=32, help="tensors in it (default: 32)")
    parser.add_argument(
        "--small", type=int, default=10_000, help="16 KiB tensors in the other (default: 10000)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="saves that count (default: 7)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="where the state is, and the steps"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=_MEMORY if _MEMORY.is_dir() else None,
        help="where to save (default: a file system in memory, or the system's temporary folder)",
    )
    parser.add_argument(
        "--json", type=Path, default=Path("build/bench/executor.json"), help="where every sample goes"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
