"""Python's collector, and what is made while it rests."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from cloudckpt.backends.transfer.gc_pause import no_collection


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    assert gc.isenabled()
    yield
    gc.enable()


def _are_in(made: list[list[int]], generation: int) -> bool:
    there = {id(one) for one in gc.get_objects(generation)}
    return all(id(one) in there for one in made)


def test_nothing_is_collected_until_the_end_whatever_happens() -> None:
    def fail() -> None:
        with no_collection():
            assert not gc.isenabled()
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with no_collection():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_what_was_made_is_old_afterwards() -> None:
    with no_collection():
        made = [[number] for number in range(10_000)]
        assert _are_in(made, 0)
    assert _are_in(made, 2)


def test_what_the_application_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with no_collection():
            pass
        assert gc.get_freeze_count() >= frozen - 100  # some of it may have gone
    finally:
        gc.unfreeze()
