"""Dicts, lists and tuples come back as they were saved, whatever the state held before the load."""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import MultiStepLR

import cloudckpt
from support.exact import Holder, assert_same

FULL = [{"name": "a", "at": 1}, {"name": "b", "at": 2}]


@pytest.fixture(scope="module")
def checkpointer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cloudckpt.Checkpointer]:
    uri = tmp_path_factory.mktemp("containers") / "run"
    with cloudckpt.Checkpointer(uri, overwrite=True, progress=False) as made:
        yield made


class Callback:
    """Keeps a list."""

    def __init__(self, *seen: Any) -> None:
        self.seen = list(seen)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen), "n": len(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


@pytest.mark.parametrize("before", [(), ({"name": "old", "at": 0},), (*FULL, {"name": "x", "at": 9})])
@pytest.mark.parametrize("saved", [[], FULL[:1], FULL])
def test_an_object_gets_the_list_that_it_saved(
    checkpointer: cloudckpt.Checkpointer, saved: list[Any], before: tuple[Any, ...]
) -> None:
    checkpointer.save(0, {"callback": Callback(*saved)})
    fresh = Callback(*before)
    checkpointer.load({"callback": fresh})
    assert_same(fresh.seen, saved)


def counts() -> collections.defaultdict[str, Any]:
    made: collections.defaultdict[str, Any] = collections.defaultdict(list)
    made.update(a=[1], b=[])
    return made


VALUES: dict[str, Callable[[], Any]] = {
    "empty dict": dict,
    "empty list": list,
    "list of empty dicts": lambda: [{}, {}],
    "empty in empty": lambda: {"a": {"b": {}}, "c": [[], [{}]]},
    "int keys": lambda: {1: 10, 2: 20, -3: {4: {}}},
    "keys of many kinds": lambda: {None: 1, True: 2, 0.5: 3, b"x": 4, (0, 1): 5, (): 6, "": 7},
    "tensors under int keys": lambda: {0: torch.ones(2), 1: {2: torch.zeros(3)}},
    "order": lambda: {"z": 1, "a": torch.ones(1), "m": 2},
    "OrderedDict": lambda: collections.OrderedDict([("b", 1), ("a", torch.ones(2))]),
    "Counter": lambda: collections.Counter({2: 1, 6: 3, 4: 1}),
    "empty Counter": collections.Counter,
    "defaultdict": counts,
    "defaultdict without a factory": lambda: collections.defaultdict(None, {"a": torch.ones(1)}),
    "lists in lists": lambda: [[torch.ones(1)], [torch.zeros(2), [torch.ones(3), 4]], [], "x"],
    "dicts in a list": lambda: [{"a": {1: 2}}, {"b": [{}]}],
    "tuple": lambda: ({"a": torch.ones(1)}, 2),
    "nested None": lambda: {"a": None, "b": [None, (None,)]},
}


@pytest.mark.parametrize("before", ["nothing", "the same", "something else"])
@pytest.mark.parametrize("name", VALUES)
def test_a_container_is_what_was_saved(checkpointer: cloudckpt.Checkpointer, name: str, before: str) -> None:
    saved = VALUES[name]()
    checkpointer.save(0, {"value": saved, "w": torch.ones(1)})
    state: dict[str, Any] = {
        "value": {"nothing": None, "the same": VALUES[name](), "something else": {}}[before],
        "w": torch.zeros(1),
    }
    checkpointer.load(state)
    assert_same(state, {"value": VALUES[name](), "w": torch.ones(1)})


@pytest.mark.parametrize("saved", [[1, 2], [], {}, 5, None, (1, torch.ones(2)), [{}]], ids=repr)
@pytest.mark.parametrize(
    "around",
    [lambda one: one, lambda one: [one], lambda one: ({"x": [one]}, 3)],
    ids=["itself", "in a list", "in a tuple"],
)
def test_an_object_may_have_any_state_and_be_anywhere(
    checkpointer: cloudckpt.Checkpointer, around: Callable[[Any], Any], saved: Any
) -> None:
    checkpointer.save(0, {"object": around(Holder(saved))})
    fresh = Holder("nothing")
    state = {"object": around(fresh)}
    checkpointer.load(state)
    assert_same(fresh.state, saved)


def test_containers_of_the_state_are_filled_in_place(checkpointer: cloudckpt.Checkpointer) -> None:
    checkpointer.save(0, {"outer": {"inner": {"a": 1}, "items": [{"b": 2}]}})
    inner: dict[str, Any] = {}
    items: list[Any] = []
    checkpointer.load({"outer": {"inner": inner, "items": items}})
    assert inner == {"a": 1}
    assert items == [{"b": 2}]


def test_a_schedule_with_int_milestones_goes_on(checkpointer: cloudckpt.Checkpointer) -> None:
    def make() -> tuple[torch.optim.Optimizer, MultiStepLR]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        return optimizer, MultiStepLR(optimizer, [2, 4, 4, 6], 0.1)

    def run(optimizer: torch.optim.Optimizer, scheduler: MultiStepLR, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    whole = run(*make(), 8)
    optimizer, scheduler = make()
    first = run(optimizer, scheduler, 3)
    checkpointer.save(0, {"scheduler": scheduler, "lr": optimizer.param_groups[0]["lr"]})
    resumed, fresh = make()
    state = {"scheduler": fresh, "lr": 0.0}
    checkpointer.load(state)
    resumed.param_groups[0]["lr"] = state["lr"]
    assert_same(fresh.milestones, collections.Counter({2: 1, 4: 2, 6: 1}))
    assert first + run(resumed, fresh, 5) == whole
    checkpointer.save(0, {"scheduler": fresh})


class OwnDict(dict[str, Any]):
    """A mapping of a class that a load would have to know."""


class OwnList(list[Any]):
    """The same of a list."""


def own_itself() -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["again"] = [made]
    return made


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dotted key beside a dict": (lambda: {"a.b": 1, "a": {"b": 2}}, "'v.a.b'"),
    "dotted key beside an empty dict": (lambda: {"a.b": 1, "a": {"b": {}}}, "'v.a.b'"),
    "1 and '1'": (lambda: {1: torch.ones(2), "1": torch.zeros(2)}, "'v.1'.*1 and '1'"),
    "a mapping of another class": (OwnDict, "'v' is a .*OwnDict"),
    "a list of another class": (lambda: OwnList([torch.ones(1)]), "OwnList"),
    "a key of another class": (lambda: {frozenset({1}): 1}, "'v'.*frozenset"),
    "a factory of one's own": (lambda: collections.defaultdict(lambda: 3), "'v'.*factory"),
    "itself": (own_itself, "'v.*itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_come_back_is_refused_by_its_path(
    checkpointer: cloudckpt.Checkpointer, name: str
) -> None:
    make, said = REFUSED[name]
    with pytest.raises(cloudckpt.ConfigurationError, match=said) as refused:
        checkpointer.save(0, {"v": make(), "w": torch.ones(1)})
    assert refused.value.hint
    with pytest.raises(cloudckpt.ConfigurationError, match=said):
        checkpointer.warmup({"v": make(), "w": torch.ones(1)})
    checkpointer.save(0, {"w": torch.ones(1)})


def test_what_the_checkpoint_lacks_is_named(checkpointer: cloudckpt.Checkpointer) -> None:
    checkpointer.save(0, {"d": {"a": 1, "t": torch.ones(1)}, "items": [torch.ones(1)]})
    for state, lacking in (
        ({"d": {"a": 1, "new": 2}}, "'d.new'"),
        ({"d": {"t": torch.zeros(1), "u": torch.zeros(1)}}, "'d.u'"),
        ({"items": [torch.zeros(1), torch.zeros(1)]}, "'items.1'"),
        ({"other": {"x": {}, "y": [{"z": 1}]}}, "'other.y.0.z'"),
    ):
        with pytest.raises(cloudckpt.ConfigurationError, match=f"asks for {lacking}"):
            checkpointer.load(state)


def test_what_nobody_asked_for_is_reported(
    checkpointer: cloudckpt.Checkpointer, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer.save(
        0, {"a": torch.ones(1), "b": {"c": 1, "d": 2}, "e": {"x": torch.ones(1), "y": torch.ones(1)}}
    )
    with caplog.at_level(logging.WARNING, "cloudckpt"):
        checkpointer.load({"a": torch.zeros(1), "e": {"x": torch.zeros(1)}})
    assert "step 0 also has 'b', 'e.y', which the state does not ask for" in caplog.text
    caplog.clear()
    checkpointer.load({"a": torch.zeros(1), "b": {}, "e": {}})
    assert "does not ask for" not in caplog.text


def test_odd_keys_are_kept(checkpointer: cloudckpt.Checkpointer, tmp_path: Path) -> None:
    odd: dict[str, Any] = {
        key: torch.full((1,), float(number))
        for number, key in enumerate(
            ["", "a/b", "../x", "ü 漢 🙂", "new\nline", "nul\0", ".", "x" * 5000, "%s {0}"]
        )
    }
    checkpointer.save(0, {**odd, "quote'\"": 3})
    state = {key: torch.zeros(1) for key in odd} | {"quote'\"": None}
    checkpointer.load(state)
    assert_same(state, {**odd, "quote'\"": 3})
