"""Running small requests side by side, each to its end, whatever becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

_T = TypeVar("_T")


def run_all(tasks: Sequence[Callable[[], _T]], concurrency: int) -> list[_T]:
    """Run all tasks to their end; results in order, or the first one's exception."""
    results: list[_T] = []
    for outcome in outcomes_of(tasks, concurrency):
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results


def outcomes_of(tasks: Sequence[Callable[[], _T]], concurrency: int) -> list[_T | BaseException]:
    """Run all tasks to their end; results or exceptions in order."""
    if not tasks:
        return []
    with ThreadPoolExecutor(min(concurrency, len(tasks)), thread_name_prefix="cloudckpt-commit") as pool:
        futures = [pool.submit(task) for task in tasks]
        wait(futures)
    return [future.exception() or future.result() for future in futures]
