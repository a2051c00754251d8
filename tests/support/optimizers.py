"""The optimizer matrix: optimizers, points in time at which a run is saved, and events.

    PYTHONPATH=tests python -m support.optimizers --table

runs everything, which takes minutes, and prints what was restored as a table of Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

Layout = Literal["one rank", "FSDP2 on two"]
Saver = Literal["cloudckpt", "torch.save", "weights alone"]
"""Who saves: the two others prove the matrix itself, one finding nothing wrong and one found out."""
Groups = list[dict[str, Any]]

LAYOUTS: dict[Layout, int] = {"one rank": 1, "FSDP2 on two": 2}
"""Ranks of each."""
POINTS = (0, 1, 5)
"""Steps that were taken when a run is saved."""
EVENTS = ("gradients", "frozen", "unused", "empty group")
RESTORED = "restored"
LR = 0.05


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model: by default such that two ranks cut rows unevenly, or have none of a parameter."""

    inputs: int = 6
    outputs: int = 5
    heads: int = 1
    bias: bool = True
    sparse: bool = False


UNEVEN = Shape()
EVEN = Shape(outputs=4, heads=2)
"""For optimizers whose arithmetic DTensor has for even shards alone."""
MATRICES = Shape(outputs=4, heads=2, bias=False)
LARGE = Shape(inputs=64, outputs=128)
"""torchao quantizes the state of a parameter that has 4096 numbers or more on a rank."""
SPARSE = Shape(bias=False, sparse=True)


class Container(Optimizer):
    """Several optimizers as one, by the two methods alone: it has no state of its own."""

    def __init__(self, parts: Mapping[str, Optimizer]) -> None:
        self.parts = dict(parts)
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> Groups:  # type: ignore[override]
        return [group for part in self.parts.values() for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        return {parameter: state for part in self.parts.values() for parameter, state in part.state.items()}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])


@dataclass(frozen=True, slots=True)
class Kind:
    """How an optimizer is made of groups of parameters, and what model it is for."""

    make: Callable[[Groups], Optimizer]
    shape: Shape = UNEVEN


def _container(groups: Groups) -> Optimizer:
    def those(wanted: Callable[[Tensor], bool]) -> Groups:
        return [{**group, "params": [one for one in group["params"] if wanted(one)]} for group in groups]

    return Container(
        {
            "muon": optim.Muon(those(lambda one: one.ndim == 2), lr=LR),
            "adamw": optim.AdamW(those(lambda one: one.ndim != 2), lr=LR),
        }
    )


def _low_bit(bits: int) -> Callable[[Groups], Optimizer]:
    def make(groups: Groups) -> Optimizer:
        import torchao.optim  # noqa: PLC0415 - takes seconds, and this module is imported to collect tests

        kind = {4: torchao.optim.AdamW4bit, 8: torchao.optim.AdamW8bit}[bits]
        made: Optimizer = kind(groups, lr=LR)
        return made

    return make


KINDS: dict[str, Kind] = {
    "Adadelta": Kind(lambda groups: optim.Adadelta(groups, lr=1.0)),
    "Adafactor": Kind(lambda groups: optim.Adafactor(groups, lr=LR)),
    "Adagrad": Kind(lambda groups: optim.Adagrad(groups, lr=LR, lr_decay=0.1, initial_accumulator_value=0.1)),
    "Adam": Kind(lambda groups: optim.Adam(groups, lr=LR, weight_decay=0.1)),
    "Adamax": Kind(lambda groups: optim.Adamax(groups, lr=LR)),
    "AdamW": Kind(lambda groups: optim.AdamW(groups, lr=LR)),
    "AdamW, amsgrad, tensor lr": Kind(
        lambda groups: optim.AdamW(groups, lr=torch.tensor(LR), amsgrad=True, foreach=False)
    ),
    "AdamW, foreach": Kind(lambda groups: optim.AdamW(groups, lr=LR, foreach=True)),
    "AdamW, fused": Kind(lambda groups: optim.AdamW(groups, lr=LR, fused=True)),
    "ASGD": Kind(lambda groups: optim.ASGD(groups, lr=LR, lambd=0.1, t0=1)),
    "LBFGS": Kind(lambda groups: optim.LBFGS(groups, lr=0.1, max_iter=3, history_size=3), shape=EVEN),
    "Muon": Kind(lambda groups: optim.Muon(groups, lr=LR), shape=MATRICES),
    "NAdam": Kind(lambda groups: optim.NAdam(groups, lr=LR)),
    "RAdam": Kind(lambda groups: optim.RAdam(groups, lr=LR)),
    "RMSprop": Kind(lambda groups: optim.RMSprop(groups, lr=LR, momentum=0.9, centered=True)),
    "Rprop": Kind(lambda groups: optim.Rprop(groups, lr=LR)),
    "SGD": Kind(lambda groups: optim.SGD(groups, lr=LR)),
    "SGD, momentum": Kind(lambda groups: optim.SGD(groups, lr=LR, momentum=0.9, dampening=0.5)),
    "SparseAdam": Kind(lambda groups: optim.SparseAdam(groups, lr=LR), shape=SPARSE),
    "torchao AdamW8bit": Kind(_low_bit(8), shape=LARGE),
    "torchao AdamW4bit": Kind(_low_bit(4), shape=LARGE),
    "container of Muon and AdamW": Kind(_container, shape=EVEN),
}


@dataclass(frozen=True, slots=True)
class Combination:
    """An optimizer, how many steps it has taken when it is saved, and what is special about the run."""

    optimizer: str
    point: int
    event: str

    @property
    def kind(self) -> Kind:
        return KINDS[self.optimizer]

    @property
    def name(self) -> str:
        return f"{self.optimizer} / {self.event} / {_POINT_NAMES[self.point]}"

    @property
    def short(self) -> bool:
        """Whether the short form has it: each optimizer with each event, at one point each and in turn."""
        at = list(KINDS).index(self.optimizer) + EVENTS.index(self.event)
        return self.point == POINTS[at % len(POINTS)]


_POINT_NAMES = {0: "before the first step", 1: "after one", 5: "after five"}
COMBINATIONS = [Combination(*parts) for parts in itertools.product(KINDS, POINTS, EVENTS)]

Results = dict[Combination, str]


def cannot(layout: Layout, combination: Combination) -> str | None:
    """Return the error with which torch itself fails to train so, with no checkpoint anywhere."""
    optimizer, event = combination.optimizer, combination.event
    if optimizer == "LBFGS" and event == "empty group":
        return "LBFGS doesn't support per-parameter options (parameter groups)"
    if LAYOUTS[layout] == 1:
        return None
    if optimizer == "LBFGS" and event in ("frozen", "unused"):  # it makes a plain tensor of no gradient
        return "aten.cat.default got mixed torch.Tensor and DTensor"
    return _CANNOT_SHARDED.get(optimizer)


_CANNOT_SHARDED = {
    "Adafactor": "aten.pow_.Scalar: in-place operations that require placement changes are not supported",
    "Rprop": "aten.index_put_.default: in-place operations that require placement changes are not supported",
    "SparseAdam": "Could not run 'fsdp::chunk_cat' with arguments from the 'SparseCPU' backend",
}


def table(results: Mapping[Layout, Results]) -> str:
    """Return the results as a table of Markdown: a row for each optimizer, a column for layout and event."""
    columns: list[tuple[Layout, str]] = [(layout, event) for layout in results for event in EVENTS]
    lines = [
        "| optimizer | " + " | ".join(f"{layout}: {event}" for layout, event in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for name in KINDS:
        cells = [_cell(layout, results[layout], name, event) for layout, event in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(layout: Layout, results: Results, optimizer: str, event: str) -> str:
    cells = [Combination(optimizer, point, event) for point in POINTS]
    if all(cannot(layout, one) for one in cells):
        return "torch can't train so"
    lost = [one for one in cells if results[one] != RESTORED]
    return "not " + ", ".join(_POINT_NAMES[one.point] for one in lost) if lost else "yes"


def main() -> None:
    from support.optimizer_runs import run  # noqa: PLC0415 - which imports this module

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print a table, and not each combination")
    parser.add_argument("--saver", choices=get_args(Saver), default="cloudckpt", help="who saves")
    parser.add_argument("--short", action="store_true", help="the short form")
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="by default all")
    args = parser.parse_args()
    layouts: Sequence[Layout] = args.layout or list(LAYOUTS)
    results: dict[Layout, Results] = {}
    for layout in layouts:
        with tempfile.TemporaryDirectory() as folder:
            wanted = [one for one in COMBINATIONS if one.short or not args.short]
            results[layout] = run(Path(folder), layout, wanted, args.saver)
    lines: Iterator[str] = (
        f"{layout} / {one.name}: {outcome}" for layout in layouts for one, outcome in results[layout].items()
    )
    sys.stdout.write((table(results) if args.table else "\n".join(lines)) + "\n")


if __name__ == "__main__":
    main()
