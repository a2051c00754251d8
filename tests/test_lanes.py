"""How many transfers run side by side, by what is measured of them."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt.backends.stores.memory import MemoryStore
from cloudckpt.backends.transfer.adaptive_concurrency import AdaptiveLimiter, Way, lanes

_SIZE = 32 << 20
_WAYS: tuple[Way, ...] = ("up", "down")


class _Link:
    """What transfers run over: how long one takes, and how much of a processor it keeps busy meanwhile."""

    def __init__(
        self,
        most: int,
        seconds: Callable[[int], float],
        busy: Callable[[int], float],
        *,
        start: int | None = None,
        loops: float = 0.0,
    ) -> None:
        self._seconds, self._busy = seconds, busy
        self._now = self._used = 0.0
        self.lanes = AdaptiveLimiter(
            most, start, clock=lambda: self._now, cpu=lambda: self._used, busy=lambda: loops
        )

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


def test_more_are_tried_while_transfers_wait_and_kept_if_they_move_more() -> None:
    link = _Link(64, lambda _: 0.4, _idle, start=8)  # each lane has a rate of its own
    link.transfer(100)
    assert link.lanes.limit == 64


def test_more_are_given_up_where_the_network_is_full() -> None:
    link = _Link(64, _fast, _idle, start=8)  # all lanes share one rate
    limits: list[int] = []
    for _ in range(1000):
        link.transfer(1)
        limits.append(link.lanes.limit)
    assert max(limits) == 16 and limits.count(16) < len(limits) / 10


def test_what_the_loops_use_counts_as_used() -> None:
    link = _Link(8, _fast, _idle, loops=0.9)
    link.transfer(100)
    assert link.lanes.limit == 2


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


def test_fewer_are_given_up_where_they_cost_more_of_the_processor() -> None:
    link = _Link(8, _fast, lambda limit: _busy(limit) * (1.0 if limit == 8 else 1.2))
    limits: list[int] = []
    for _ in range(1000):
        link.transfer(1)
        limits.append(link.lanes.limit)
    assert limits[-1] == 8 and min(limits) == 4
    assert limits.count(4) < len(limits) / 20


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
    held = AdaptiveLimiter(1)
    for _ in range(3):
        with pytest.raises(ValueError, match="wrong"), held.taken(1):
            raise ValueError("wrong")
    with held.taken(1):
        pass


def test_transfers_that_stand_still_hold_nobody_up_for_long() -> None:
    held = AdaptiveLimiter(2)
    with held.taken(1), held.taken(1), held.taken(1):
        pass
    assert held.limit == 2


def test_no_more_run_than_there_are_lanes() -> None:
    held, running, most = AdaptiveLimiter(3), 0, 0
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


def test_a_save_and_a_load_keep_to_the_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all lanes but one taken by others, parts and ranges go one by one."""
    uri = f"memory://lanes-{uuid.uuid4().hex}"
    options: dict[str, Any] = {"concurrency": 4, "part_size": 1 << 18, "memory_limit": 1 << 20}
    state = {f"t{i}": torch.full((1 << 16,), float(i)) for i in range(16)}
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    monkeypatch.setattr("cloudckpt.backends.transfer.adaptive_concurrency._PATIENCE", 60.0)
    most = {"upload_part": 0, "read_into": 0}
    for method in most:
        _watch(monkeypatch, method, most)
    with contextlib.ExitStack() as stack:
        for way in _WAYS:
            for _ in range(3):
                stack.enter_context(lanes(uri, way, 4).taken(1))
        dcp.save(state, storage_writer=cloudckpt.StorageWriter(uri, **options))
        dcp.load(loaded, storage_reader=cloudckpt.StorageReader(uri, **options))
    assert most == {"upload_part": 1, "read_into": 1}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    dcp.save(state, storage_writer=cloudckpt.StorageWriter(uri, overwrite=True, **options))
    assert most["upload_part"] > 1, "with the lanes free, they go side by side"


def _watch(monkeypatch: pytest.MonkeyPatch, method: str, most: dict[str, int]) -> None:
    """Note how many calls of a store's method run at once."""
    act, lock, running = getattr(MemoryStore, method), threading.Lock(), [0]

    def watched(*arguments: Any, **keywords: Any) -> Any:
        with lock:
            running[0] += 1
            most[method] = max(most[method], running[0])
        time.sleep(0.01)
        try:
            return act(*arguments, **keywords)
        finally:
            with lock:
                running[0] -= 1

    monkeypatch.setattr(MemoryStore, method, watched)
