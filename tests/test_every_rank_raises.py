"""An exception of any class on any rank is raised by every rank, at once, in each call of a Checkpointer."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from cloudckpt import Checkpointer, ConfigurationError
from support import injected
from support.injected import EXCEPTIONS, living
from support.living import end
from support.ranks import RankPool, RankPools

RANKS = 2
SOON = 100.0
"""Seconds within which some twenty calls end on every rank: far below what a rank waits for another."""

CALLS: dict[str, tuple[str, tuple[int, ...]]] = {
    "latest_step newest": ("latest_step", (0,)),
    "all_steps steps": ("all_steps", (0,)),
    "pin pin": ("pin", (0,)),
    "unpin unpin": ("unpin", (0,)),
    "warmup prove": ("warmup", (0,)),
    "warmup describe": ("warmup", (0, 1)),
    "warmup saving": ("warmup", (0, 1)),
    "warmup reserve": ("warmup", (0, 1)),
    "save describe": ("save", (0, 1)),
    "save saving": ("save", (0, 1)),
    "save snapshot": ("save", (0, 1)),
    "async_save saving": ("async_save", (0, 1)),
    "load settle": ("load", (0, 1)),
    "load newest": ("load", (0,)),
    "load reader": ("load", (0, 1)),
    "load fetch": ("load", (0,)),
    "load saving": ("load", (0, 1)),
    "load read_metadata": ("load", (0, 1)),
    "load set_up_reader": ("load", (0, 1)),
    "load local_plan": ("load", (0, 1)),
    "load global_plan": ("load", (0,)),
    "load finish_plan": ("load", (0, 1)),
    "load read_data": ("load", (0, 1)),
    "load loading": ("load", (0, 1)),
    "load take": ("load", (0, 1)),
    "wait settle": ("wait", (0, 1)),
}
"""A call and what raises in it, and the ranks on which that runs."""


@pytest.fixture(scope="module")
def pool(rank_pool: RankPools) -> Iterator[RankPool]:
    pool = rank_pool(RANKS)
    yield pool
    pool(end)


@pytest.fixture(scope="module")
def uri(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with a step."""
    uri = f"file://{tmp_path_factory.mktemp('ranks')}/run"

    def first(_rank: int) -> None:
        checkpointer, state = living(uri)
        # The ranks meet under this name, which no resolver is slow to find.
        with mock.patch.dict(os.environ, MASTER_ADDR="127.0.0.1"):
            checkpointer.save(0, state)

    pool(first)
    return uri


@contextlib.contextmanager
def injecting(state: dict[str, Any], place: str, make: Callable[[], BaseException]) -> Iterator[None]:
    if place in injected.PLACES:
        with injected.raising(place, make):
            yield
        return
    setattr(state["sullen"], place, make)
    yield
    setattr(state["sullen"], place, None)


def called(checkpointer: Checkpointer, call: str, step: int, state: dict[str, Any]) -> Any:
    """Make one of the calls, and return what it comes to in the end."""
    match call:
        case "latest_step" | "all_steps" | "wait":
            return getattr(checkpointer, call)()
        case "pin" | "unpin":
            return getattr(checkpointer, call)(0)
        case "warmup" | "load":
            return getattr(checkpointer, call)(state)
        case "save":
            return checkpointer.save(step, state).step
        case _:
            return checkpointer.async_save(step, state).result().step


Raised = tuple[str, str, list[str]]
"""The class, text and notes of an exception."""
INTERRUPTIONS: dict[str, Callable[[], BaseException]] = {
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": lambda: SystemExit(3),
}

_steps = itertools.count(1)


def outcomes(pool: RankPool, uri: str, what: str, where: int) -> Iterator[tuple[str, list[Raised]]]:
    """Make a call that raises on one rank, once for each kind, and tell what it came to on every rank.

    After each the ranks still agree, and in the end the call works.
    """
    call, place = what.split()
    kinds = {**EXCEPTIONS, **INTERRUPTIONS}
    steps = [next(_steps) for _ in range(len(kinds) + 1)]

    def on_rank(rank: int) -> list[Raised]:
        checkpointer, state = living(uri)
        told: list[Raised] = []
        for step, make in zip(steps, kinds.values(), strict=False):
            with injecting(state, place, make) if rank == where else contextlib.nullcontext():
                try:
                    value = called(checkpointer, call, step, state)
                except BaseException as error:  # noqa: BLE001 - what is looked at
                    told.append((type(error).__name__, str(error), list(getattr(error, "__notes__", ()))))
                else:
                    told.append(("nothing", f"{value}", []))
            assert checkpointer.latest_step() is not None
        called(checkpointer, call, steps[-1], state)
        return told

    return zip(kinds, map(list, zip(*pool(on_rank, deadline=SOON), strict=True)), strict=True)


@pytest.mark.parametrize(
    ("what", "where"), [(what, where) for what, (_, ranks) in CALLS.items() for where in ranks]
)
def test_what_one_rank_raises_every_rank_does_and_the_next_call_works(
    pool: RankPool, uri: str, what: str, where: int
) -> None:
    for kind, told in outcomes(pool, uri, what, where):
        if kind in INTERRUPTIONS:
            assert told[where][0] == kind
            name, text, _ = told[1 - where]
            assert name == "ExecutorError"
            assert f"rank {where} was interrupted by {kind}" in text
            continue
        one, other = told
        assert one == other
        name, text, notes = one
        raised = EXCEPTIONS[kind]()
        if kind == "Unpicklable":
            assert name == "CheckpointError"
            assert text.startswith("Unpicklable: a lock")  # and where, as far as that has come
        elif kind == "StorageError":
            assert name == kind
            assert "the store is full" in text
        else:
            assert (name, text) == (kind, str(raised))
        assert any(note.startswith(f"raised on rank {where}") for note in notes), notes


class Metric:
    """A number that can't be had."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __float__(self) -> float:
        raise self._error


@pytest.mark.parametrize("where", range(RANKS))
@pytest.mark.parametrize("error", [TypeError("a tensor"), RuntimeError("CUDA"), KeyboardInterrupt()])
def test_a_metric_that_is_no_number_on_one_rank_fails_the_save_on_every_rank(
    pool: RankPool, uri: str, where: int, error: BaseException
) -> None:
    step = next(_steps)

    def on_rank(rank: int) -> tuple[str, str]:
        checkpointer, state = living(uri)
        metric: Any = Metric(error) if rank == where else 0.5
        try:
            checkpointer.save(step, state, metric=metric)
        except BaseException as raised:  # noqa: BLE001 - what is looked at
            checkpointer.save(step, state, metric=0.5)
            return type(raised).__name__, str(raised)
        return "nothing", ""

    told = pool(on_rank, deadline=SOON)
    if isinstance(error, KeyboardInterrupt):
        assert told[where][0] == "KeyboardInterrupt"
        assert "was interrupted by KeyboardInterrupt" in told[1 - where][1]
    else:
        assert told[0] == told[1] and str(error) in told[0][1]


@pytest.mark.parametrize("steps", [(0, "new"), ("new", 0), ("x", None), (None, "x"), ("x", 0), (0, "x")])
def test_a_load_of_other_steps_on_other_ranks_is_refused_on_every_rank(
    pool: RankPool, uri: str, steps: tuple[Any, Any]
) -> None:
    new = next(_steps)

    def on_rank(rank: int) -> tuple[str, str]:
        checkpointer, state = living(uri)
        checkpointer.save(new, state)
        step: Any = new if steps[rank] == "new" else steps[rank]
        with pytest.raises(ConfigurationError) as refused:
            checkpointer.load(state, step)
        assert checkpointer.load(state, 0 if rank == 0 else None) == 0
        return str(refused.value), type(refused.value).__name__

    first, second = pool(on_rank, deadline=SOON)
    assert first == second
