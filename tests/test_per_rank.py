"""A value for each rank: its policy for another number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from cloudckpt import ConfigurationError, PerRank
from cloudckpt.state.per_rank import DROPPED, key_of, needed, resize

VALUES = ["a", "b", "c"]


@pytest.mark.parametrize("policy", ["error", "first", "drop", lambda *_: "made"])
def test_on_as_many_ranks_each_gets_its_own(policy: Any) -> None:
    assert [resize(VALUES, rank, 3, policy) for rank in range(3)] == VALUES
    assert [list(needed(3, rank, 3, policy)) for rank in range(3)] == [[0], [1], [2]]


@pytest.mark.parametrize("world_size", [1, 2, 4, 5])
def test_another_number_is_an_error_that_names_the_key_unless_a_policy_says_otherwise(
    world_size: int,
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resize(VALUES, 0, world_size, "error", key="rng")
    assert f"'rng' has a value for each of 3 ranks, and {world_size} load it" in str(caught.value)
    assert "on_resize='first'" in (caught.value.hint or "")
    assert list(needed(3, 0, world_size, "error")) == []


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_first_gives_every_rank_the_value_of_rank_0(world_size: int) -> None:
    assert {resize(VALUES, rank, world_size, "first") for rank in range(world_size)} == {"a"}
    assert {tuple(needed(3, rank, world_size, "first")) for rank in range(world_size)} == {(0,)}


def test_drop_leaves_ranks_that_were_not_there_as_they_are() -> None:
    assert [resize(VALUES, rank, 5, "drop") for rank in range(5)] == [*VALUES, DROPPED, DROPPED]
    assert [resize(VALUES, rank, 2, "drop") for rank in range(2)] == ["a", "b"]
    assert [list(needed(3, rank, 5, "drop")) for rank in range(5)] == [[0], [1], [2], [], []]


def test_a_callable_makes_each_ranks_value_of_all() -> None:
    def halves(values: list[Any], rank: int, world_size: int) -> Any:
        return values, rank, world_size

    assert [resize(VALUES, rank, 2, halves) for rank in range(2)] == [(VALUES, 0, 2), (VALUES, 1, 2)]
    assert list(needed(3, 1, 2, halves)) == [0, 1, 2]


@pytest.mark.parametrize("policy", ["none", "", None, 1, ["first"]])
def test_no_policy_is_refused_at_once(policy: Any) -> None:
    with pytest.raises(ConfigurationError, match="on_resize is"):
        PerRank(1, on_resize=policy)


def test_one_in_another_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="holds another PerRank"):
        PerRank(PerRank(1))


def test_it_holds_what_it_was_given() -> None:
    own = PerRank([1], on_resize="drop")
    assert (own.value, own.on_resize) == ([1], "drop")
    own.value = [2]
    assert repr(own) == "PerRank([2], on_resize='drop')"
    assert key_of("place", 3) == "place.3"
