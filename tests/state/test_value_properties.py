"""Random nested values of every kind are restored exactly, or refused."""

from __future__ import annotations

import collections
import datetime as dt
import decimal
import io
import pathlib
import types
import zoneinfo
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cloudckpt.backends.state.values import dumps, loads, prove_safe, refusal
from support import value_classes as users
from support.plain_values import difference
from support.value_digest import digest

KEYS = st.one_of(
    st.text(max_size=5),
    st.integers(),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False),
    st.binary(max_size=5),
    st.sampled_from([*users.Mode, *users.Level, *users.Word, *users.Hashed, users.Frozen(1)]),
    st.tuples(st.integers(), st.text(max_size=3)),
    st.frozensets(st.integers(), max_size=3),
    st.dates(),
    st.uuids(),
    st.fractions(),
    st.builds(np.int32, st.integers(-5, 5)),
)
DTYPES = st.one_of(
    hnp.scalar_dtypes(),
    hnp.array_dtypes(subtype_strategy=hnp.scalar_dtypes(), max_size=3),
    hnp.nested_dtypes(),
    st.just(np.dtype(object)),
)
ZONES = st.sampled_from(
    [None, dt.UTC, dt.timezone(dt.timedelta(hours=1), "x"), zoneinfo.ZoneInfo("Asia/Tokyo")]
)
LEAVES = st.one_of(
    KEYS,
    st.text(alphabet=st.characters(exclude_categories=()), max_size=8),
    st.floats(),
    st.complex_numbers(),
    st.integers(-(1 << 3000), 1 << 3000),
    st.binary(max_size=300).map(bytearray),
    st.decimals(),
    st.builds(dt.datetime.combine, st.dates(), st.times(), ZONES),
    st.times(timezones=ZONES),
    st.timedeltas(),
    st.builds(range, st.integers(), st.integers(), st.integers(1, 9)),
    st.text(alphabet="ab/.", max_size=8).map(pathlib.PurePosixPath),
    st.sampled_from([*users.Guessing, users.Right(3), ..., NotImplemented, torch.int8, torch.device("cpu")]),
    st.binary(max_size=9).map(io.BytesIO),
    st.text(max_size=9).map(io.StringIO),
    DTYPES,
    DTYPES.filter(lambda one: not one.hasobject).flatmap(
        lambda one: hnp.arrays(one, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    ),
    hnp.arrays(hnp.scalar_dtypes(), 1).map(lambda one: one[0]),
    st.sampled_from(
        [
            torch.tensor(0.5), torch.arange(6).reshape(2, 3).t(), torch.zeros(0), torch.eye(2).to_sparse(),
            torch.ones(1, device="meta"), torch.nn.Parameter(torch.ones(2)),
            torch.ones(2, dtype=torch.float8_e5m2),
        ]
    ),
    st.just(users.Plain()),
    st.just(users.Restoring()),
    st.just(len),
)  # fmt: skip


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    items = st.lists(inner, max_size=3)
    pairs = st.dictionaries(KEYS, inner, max_size=3)
    named = st.dictionaries(st.sampled_from(["a", "b"]), inner)
    return st.one_of(
        items,
        items.map(tuple),
        pairs,
        st.sets(KEYS, max_size=3),
        items.map(lambda held: collections.deque(held, 9)),
        pairs.map(collections.OrderedDict),
        pairs.map(lambda held: collections.defaultdict(list, held)),
        pairs.map(collections.Counter),
        named.map(lambda held: types.SimpleNamespace(**held)),
        st.builds(users.Point, inner, inner),
        st.builds(users.Pair, inner, inner),
        st.builds(users.Config, inner, inner),
        st.builds(users.Slotted, inner, inner),
        st.builds(users.FrozenSlotted, inner, inner),
        items.map(lambda held: [held, held]),
        items.map(object_array),
    )


def object_array(items: list[Any]) -> Any:
    array = np.empty(len(items), dtype=object)
    for at, item in enumerate(items):
        array[at] = item
    return array


VALUES = st.recursive(LEAVES, containers, max_leaves=8)
FOUND: collections.Counter[str] = collections.Counter()


def check(value: Any) -> None:
    """Save and load a value, or see it refused."""
    if (found := refusal(value)) is not None:
        assert found.class_name and found.reason and found.hint
        FOUND["refused"] += 1
        return
    FOUND["restored"] += 1
    data = dumps(value).getbuffer()
    again = loads(data, "x")
    assert difference(value, again) is None
    assert digest(again) == digest(value)
    assert difference(value, torch.load(prove_safe(data, "x"), weights_only=False)) is None


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    derandomize=True,
)
@given(VALUES)
def check_random_values(value: Any) -> None:
    check(value)


def test_a_random_value_is_restored_exactly_or_refused() -> None:
    FOUND.clear()
    check_random_values()
    assert min(FOUND["restored"], FOUND["refused"]) > 20


@pytest.mark.soak
@pytest.mark.timeout(3600)
@settings(
    max_examples=30_000,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(VALUES)
def test_many_random_values_are_restored_exactly_or_refused(value: Any) -> None:
    check(value)


@settings(max_examples=100, deadline=None)
@given(st.decimals(allow_nan=None))
def test_decimals_with_payloads(value: decimal.Decimal) -> None:
    check((value, decimal.Decimal("sNaN5")))
