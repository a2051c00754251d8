"""Run small requests concurrently, each to its end, also where others fail."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from cloudckpt.backends.errors import ExecutorError
from cloudckpt.backends.system.system_limits import Workers, in_thread

_T = TypeVar("_T")

Task = Callable[[], _T]


def start_task(task: Task[_T], *, concurrent: bool) -> Future[_T]:
    """Begin a task on a thread of its own if ``concurrent``, and else run it here.

    Raises:
        BaseException: what the task raised here; on its own thread that is the result.
    """
    if concurrent:
        return in_thread(task, "cloudckpt-request")
    done: Future[_T] = Future()
    done.set_result(task())
    return done


def run_all(tasks: Sequence[Task[_T]], most: int, limit: Callable[[], int] | None = None) -> list[_T]:
    """Run all tasks to their end; results in order, or the first one's exception."""
    results: list[_T] = []
    for outcome in outcomes_of(tasks, most, limit):
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results


def outcomes_of(
    tasks: Sequence[Task[_T]], most: int, limit: Callable[[], int] | None = None
) -> list[_T | BaseException]:
    """Run all tasks to their end, ``most`` at once; results or exceptions in order.

    ``limit`` says how many at once, up to ``most``, are worth while at the moment.
    """
    if not tasks:
        return []
    with Workers(min(most, len(tasks)), thread_name_prefix="cloudckpt-commit") as pool:
        return _Crew(tasks, pool, limit or (lambda: most)).work_off()


class _Crew(Generic[_T]):
    """Workers that go on from one task to the next by themselves.

    A task that is handed to another thread has that one find its memory cold, and both take turns at the
    interpreter's lock. So there are no more workers than tasks that may run.
    """

    def __init__(self, tasks: Sequence[Task[_T]], pool: Workers, limit: Callable[[], int]) -> None:
        self._count = len(tasks)
        self._coming = deque(enumerate(tasks))
        self._outcomes: dict[int, _T | BaseException] = {}
        self._pool = pool
        self._limit = limit
        self._working = 0
        self._changed = threading.Condition()

    def work_off(self) -> list[_T | BaseException]:
        """Run all tasks to their end."""
        with self._changed:
            try:
                self._hire()
                self._changed.wait_for(lambda: len(self._outcomes) == self._count)
            finally:
                self._coming.clear()  # after Ctrl-C: a task that has not started never will
        return [self._outcomes[index] for index in range(self._count)]

    def _allowed(self) -> int:
        return max(1, self._limit())

    def _hire(self) -> None:
        """Have as many workers as are allowed, and not more than there are tasks.

        Raises:
            ExecutorError: no thread can be started.
        """
        for _ in range(min(self._allowed() - self._working, len(self._coming))):
            self._working += 1
            try:
                self._pool.submit(self._work)
            except ExecutorError:
                self._working -= 1
                if self._working:  # those that there are go on
                    return
                raise

    def _work(self) -> None:
        while (coming := self._next()) is not None:
            index, task = coming
            try:
                outcome: _T | BaseException = task()
            except BaseException as error:  # noqa: BLE001 - raised by the caller, with the other outcomes
                outcome = error
            with self._changed:
                self._outcomes[index] = outcome
                if len(self._outcomes) == self._count:
                    self._changed.notify_all()

    def _next(self) -> tuple[int, Task[_T]] | None:
        """Take a task, or go: where there is none, and where others are enough."""
        with self._changed:
            self._hire()
            if self._coming and self._working <= self._allowed():
                return self._coming.popleft()
            self._working -= 1
            return None
