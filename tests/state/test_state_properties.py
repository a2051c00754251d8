"""Random nested states are restored exactly or refused by the save; no load refuses what was saved."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import cloudckpt
from support.exact import Holder
from support.plain_values import difference

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(),
    st.decimals(allow_nan=False),
    st.datetimes(),
    st.timedeltas(),
    st.uuids(),
    st.frozensets(st.integers()),
    st.builds(lambda items: collections.deque(items, maxlen=5), st.lists(st.integers(), max_size=3)),
    st.integers(0, 4).map(np.arange),
    st.floats().map(np.float64),
    st.just(object()),
    st.just(print),
)


def tensors() -> st.SearchStrategy[torch.Tensor]:
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
    shapes = st.lists(st.integers(0, 3), max_size=3)
    return st.builds(lambda dtype, shape: torch.ones(shape).to(dtype), dtypes, shapes)


KEYS = st.one_of(
    st.text(max_size=3),
    st.integers(-2, 2),
    st.booleans(),
    st.none(),
    st.tuples(st.integers(0, 1)),
    st.floats(0, 1),
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.lists(st.tuples(KEYS, inner), max_size=3)
    return st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b", "a.b", "0"]), inner, max_size=3),
        st.builds(collections.OrderedDict, pairs),
        st.builds(lambda items: collections.defaultdict(list, items), pairs),
        st.lists(inner, max_size=2).map(tuple),
    )


STATES = st.dictionaries(
    st.sampled_from(["x", "y", "x.a", "z"]),
    st.recursive(VALUES | tensors(), containers, max_leaves=8),
    max_size=3,
)


@pytest.fixture(scope="module")
def checkpointer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cloudckpt.Checkpointer]:
    uri = tmp_path_factory.mktemp("properties") / "run"
    with cloudckpt.Checkpointer(uri, overwrite=True, progress=False) as made:
        yield made


def round_trips(checkpointer: cloudckpt.Checkpointer, state: dict[str, Any], held: bool) -> None:
    saved: dict[str, Any] = {"held": Holder(copy.deepcopy(state))} if held else copy.deepcopy(state)
    hint: str | None = None
    try:
        checkpointer.save(0, saved)
    except cloudckpt.ConfigurationError as refused:
        hint = refused.hint or ""
    if hint is not None:
        event("refused")
        assert hint, "no cure"
        return
    event("saved")
    if held:
        fresh = Holder({})
        checkpointer.load({"held": fresh})
        assert difference(fresh.state, state) is None
        return
    loaded: dict[str, Any] = dict.fromkeys(state)
    checkpointer.load(loaded)
    assert difference(loaded, state) is None


CHECKED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=60, deadline=None, suppress_health_check=CHECKED)
@given(state=STATES, held=st.booleans())
def test_a_state_is_restored_exactly_or_refused(
    checkpointer: cloudckpt.Checkpointer, state: dict[str, Any], held: bool
) -> None:
    round_trips(checkpointer, state, held)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@settings(max_examples=5_000, deadline=None, suppress_health_check=CHECKED)
@given(state=STATES, held=st.booleans())
def test_thousands_of_states_are_restored_exactly_or_refused(
    checkpointer: cloudckpt.Checkpointer, state: dict[str, Any], held: bool
) -> None:
    round_trips(checkpointer, state, held)
