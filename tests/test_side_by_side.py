"""Small requests side by side: all to their end, on as many threads as are worth while."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Callable

import pytest

from cloudckpt.backends.transfer.task_pool import outcomes_of, run_all


class _Gauge:
    """Tasks that tell how many of them run at once, and on which threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self.most = 0
        self.threads: set[int] = set()
        self.done = 0

    def task(self, meanwhile: Callable[[], object] = lambda: time.sleep(0.001)) -> None:
        """Run, and by default for so long that the others have their turn."""
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
            self.threads.add(threading.get_ident())
        meanwhile()
        with self._lock:
            self._running -= 1
            self.done += 1


def _failing(number: int) -> Callable[[], int]:
    def task() -> int:
        if number % 3 == 1:
            raise ValueError(number)
        return number

    return task


@pytest.mark.parametrize("most", [1, 2, 64])
@pytest.mark.parametrize("count", [0, 1, 10])
def test_every_task_ends_and_is_accounted_for_in_order(count: int, most: int) -> None:
    outcomes = outcomes_of([_failing(number) for number in range(count)], most)
    for number, outcome in enumerate(outcomes):
        if number % 3 == 1:
            assert isinstance(outcome, ValueError)
            assert outcome.args == (number,)
        else:
            assert outcome == number
    assert len(outcomes) == count


def test_the_first_failure_is_raised_when_all_have_ended() -> None:
    ended: list[int] = []
    tasks = [_failing(number) for number in range(9)]

    def noted(number: int) -> Callable[[], int]:
        def task() -> int:
            ended.append(number)
            return tasks[number]()

        return task

    with pytest.raises(ValueError, match="1"):
        run_all([noted(number) for number in range(9)], 4)
    assert sorted(ended) == list(range(9))


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_threads_take_part_than_are_worth_while(limit: int) -> None:
    gauge = _Gauge()
    run_all([gauge.task] * 100, 16, lambda: limit)
    assert gauge.done == 100
    assert gauge.most == limit
    assert len(gauge.threads) == limit


def test_there_are_more_as_soon_as_more_are_worth_while() -> None:
    gauge = _Gauge()
    run_all([gauge.task] * 100, 16, lambda: 1 if gauge.done < 20 else 4)
    assert gauge.most == 4


def test_there_are_fewer_as_soon_as_fewer_are_worth_while() -> None:
    early, late, all_eight = _Gauge(), _Gauge(), threading.Barrier(8)
    meeting = functools.partial(early.task, functools.partial(all_eight.wait, 30))
    tasks = [meeting] * 8 + [early.task] * 12 + [late.task] * 50
    run_all(tasks, 16, lambda: 8 if early.done < 10 else 2)
    assert early.most == 8
    assert late.done == 50
    assert len(late.threads) <= 2


def test_where_no_more_threads_can_be_started_those_there_are_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, 0

    def start_some(thread: threading.Thread) -> None:
        nonlocal started
        if started == 2:
            raise RuntimeError("can't start new thread")
        started += 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    gauge = _Gauge()
    run_all([gauge.task] * 50, 16, lambda: 1 if gauge.done < 10 else 8)
    assert gauge.done == 50
    assert len(gauge.threads) == 2


def test_where_no_thread_can_be_started_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def start_none(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start_none)
    with pytest.raises(RuntimeError, match="can't start"):
        run_all([_Gauge().task] * 5, 4)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("limit", [0, -1])
def test_one_always_goes_on(limit: int, first: int) -> None:
    gauge = _Gauge()
    run_all([gauge.task] * 10, 4, lambda: first if not gauge.done else limit)
    assert gauge.done == 10


def test_what_has_not_begun_when_the_wait_is_interrupted_never_does() -> None:
    gauge = _Gauge()
    main = threading.get_ident()

    def interrupt() -> None:
        time.sleep(0.1)  # until the main thread waits: a signal on the way there is heard of only later
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.1)  # until the main thread has heard of it

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            run_all([interrupt, *[gauge.task] * 100], 1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert gauge.done < 100
