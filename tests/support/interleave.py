"""Every interleaving of a few actors, one step at a time: a stateless search that runs the real code.

An actor is a thread that runs only while the search waits for it, so that of all threads one runs at any
time. A run is a schedule of choices, made anew from the start each time: threads can't be copied. Two
schedules that lead to the same state have the same continuations, so one of them is followed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Choice = TypeVar("Choice")


class Violation(AssertionError):
    """What must never happen did; the message ends with the schedule that leads there."""


class AbandonedError(BaseException):
    """The run is over. Unwinds an actor's thread; not an Exception, for it is nobody's to handle."""


class Strand:
    """A thread that runs only while whoever called ``resume`` waits for it to ``pause`` or to end."""

    def __init__(self, name: str, body: Callable[[], object]) -> None:
        self._body = body
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self.done = False
        self.value: object = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Let the thread run to its next pause, or to its end."""
        self._go.release()
        self._back.acquire()

    def pause(self) -> None:
        """Wait to be resumed; may be called from any thread that the strand waits for."""
        self._back.release()
        self._go.acquire()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            self.value = self._body()
        except BaseException as error:  # noqa: BLE001 - how an actor ends is what is looked at
            self.error = error
        self.done = True
        self._back.release()


class Run(Protocol[Choice]):
    """One execution from the start, driven by whoever explores."""

    def state(self) -> Hashable:
        """All that decides what can still happen, and what will be found wrong in it."""
        ...

    def choices(self) -> list[Choice]:
        """What can happen next; nothing at the end."""
        ...

    def take(self, choice: Choice) -> None:
        """Let it happen. Raises ``Violation``, also for what was wrong about the step."""
        ...

    def check(self) -> None:
        """Raise ``Violation`` where the state is wrong."""
        ...

    def trace(self) -> str:
        """What happened so far, a line a step."""
        ...

    def close(self) -> None:
        """End every thread."""
        ...


@dataclass(slots=True)
class Explored(Generic[Choice]):
    """How much a search has seen."""

    schedules: int = 0
    """Runs, each of which differs from every other in its choices."""
    states: int = 0
    """States that differ."""
    steps: int = 0
    """Choices taken for the first time, of all that there are: edges between the states."""
    ends: int = 0
    """States with nothing left to happen."""


def explore(begin: Callable[[], Run[Choice]]) -> Explored[Choice]:
    """Take every choice in every state that can be reached, shortest schedules first.

    Raises:
        Violation: the first that was found.
    """
    explored: Explored[Choice] = Explored()
    seen: set[Hashable] = set()
    todo: deque[tuple[Choice, ...]] = deque([()])
    while todo:
        schedule = list(todo.popleft())
        explored.schedules += 1
        with closing(begin()) as run:
            for known in schedule[:-1]:
                run.take(known)
            try:
                if schedule:
                    run.take(schedule[-1])
                    explored.steps += 1
                _follow(run, schedule, seen, todo, explored)
            except Violation as violation:
                raise Violation(f"{violation}\n{run.trace()}") from violation
    explored.states = len(seen)
    return explored


def _follow(
    run: Run[Choice],
    schedule: list[Choice],
    seen: set[Hashable],
    todo: deque[tuple[Choice, ...]],
    explored: Explored[Choice],
) -> None:
    """Go on to the end, or to a state that was seen before, and note the ways not taken."""
    while True:
        run.check()
        if (state := run.state()) in seen:
            return
        seen.add(state)
        choices = run.choices()
        if not choices:
            explored.ends += 1
            return
        first, *others = choices
        todo.extend((*schedule, other) for other in others)
        run.take(first)
        explored.steps += 1
        schedule.append(first)
