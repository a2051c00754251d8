"""How many transfers run side by side, by what is measured of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from cloudckpt.backends.lanes import Lanes, lanes

_SIZE = 32 << 20


class _Link:
    """What transfers run over: how long one takes, and how much of a processor it keeps busy meanwhile."""

    def __init__(self, most: int, seconds: Callable[[int], float], busy: Callable[[int], float]) -> None:
        self._seconds, self._busy = seconds, busy
        self._now = self._used = 0.0
        self.lanes = Lanes(most, clock=lambda: self._now, cpu=lambda: self._used)

    def transfer(self, rounds: int) -> None:
        """Use all lanes at once, so many times."""
        for _ in range(rounds):
            limit = self.lanes.limit
            with contextlib.ExitStack() as stack:
                for _ in range(limit):
                    stack.enter_context(self.lanes.taken(_SIZE))
                seconds = self._seconds(limit)
                self._now += seconds
                self._used += seconds * self._busy(limit)

    def change(self, seconds: Callable[[int], float], busy: Callable[[int], float]) -> None:
        self._seconds, self._busy = seconds, busy


def _fast(limit: int) -> float:
    """A link that moves as much with few lanes as with many: each takes longer the more there are."""
    return 0.1 * limit


def _busy(limit: int) -> float:
    """One processor, shared."""
    return 1.0 / limit


def _idle(limit: int) -> float:
    return 0.08 / limit


def test_fewer_are_enough_where_the_processor_is_what_limits() -> None:
    link = _Link(8, _fast, _busy)
    link.transfer(100)
    assert link.lanes.limit == 2


def test_all_run_where_they_wait_for_the_network() -> None:
    link = _Link(8, lambda _: 0.4, _idle)
    link.transfer(100)
    assert link.lanes.limit == 8


def test_fewer_are_given_up_where_that_is_slower_and_tried_ever_more_rarely() -> None:
    link = _Link(8, lambda _: 0.4, _busy)  # the processor is busy, and yet twice as many move twice as much
    limits: list[int] = []
    for _ in range(1000):
        link.transfer(1)
        limits.append(link.lanes.limit)
    assert limits[-1] == 8
    halves = len(limits) // 2
    assert limits[:halves].count(4) > limits[halves:].count(4)
    assert limits.count(4) < len(limits) / 20
    assert min(limits) == 4


def test_there_are_more_again_when_the_processor_has_time() -> None:
    link = _Link(8, _fast, _busy)
    link.transfer(100)
    link.change(lambda _: 0.4, _idle)
    link.transfer(100)
    assert link.lanes.limit == 8


@pytest.mark.parametrize("most", [1, 2])
def test_few_stay_as_they_are(most: int) -> None:
    link = _Link(most, _fast, _busy)
    link.transfer(100)
    assert link.lanes.limit == most


def test_a_transfer_that_fails_gives_its_lane_back() -> None:
    held = Lanes(1)
    for _ in range(3):
        with pytest.raises(ValueError, match="wrong"), held.taken(1):
            raise ValueError("wrong")
    with held.taken(1):
        pass


def test_no_more_run_than_there_are_lanes() -> None:
    held, running, most = Lanes(3), 0, 0
    lock, full = threading.Lock(), threading.Barrier(3)

    def run(number: int) -> None:
        nonlocal running, most
        with held.taken(1):
            with lock:
                running += 1
                most = max(most, running)
            if number < 3:
                full.wait(30)  # the first three do run side by side
            with lock:
                running -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(30)))
    assert most == 3


def test_what_was_found_out_is_kept_for_the_bucket_and_the_way() -> None:
    one = lanes("s3://bucket/run/step-1", "up", 8)
    assert lanes("s3://bucket/run/step-2", "up", 8) is one
    assert lanes("s3://bucket/run/step-1", "down", 8) is not one
    assert lanes("s3://other/run/step-1", "up", 8) is not one
    assert lanes("s3://bucket/run/step-1", "up", 4) is not one
