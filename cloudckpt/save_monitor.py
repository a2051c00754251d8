"""A thread that follows the saves under way: it tells of them as events, and shows how far they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cloudckpt.backends.errors import ExecutorError
from cloudckpt.backends.system import background_log, system_limits
from cloudckpt.events import (
    CheckpointInfo,
    Committed,
    Event,
    Failed,
    Loaded,
    OnEvent,
    Planned,
    Pruned,
    Staged,
    Uploaded,
)
from cloudckpt.executor import SaveHandle
from cloudckpt.executor.forks import Owner
from cloudckpt.progress import Display
from cloudckpt.story import Story

_log = background_log.logger(__name__)

_LOOK = 0.1
"""Seconds between two looks at the saves in progress; an end is noticed at once."""
_PLANNED = ("writing", "committing", "committed", "done")
_UPLOADED = _PLANNED[1:]


@dataclass(slots=True)
class _Save:
    """A save in progress, and the events that were sent of it."""

    step: int
    uri: str
    rank: int
    handle: SaveHandle[CheckpointInfo]
    blocked: float
    pruned: Callable[[], tuple[int, ...]]
    staged: bool = False
    planned: bool = False
    uploaded: bool = False

    def news(self, *, ended: bool) -> Iterator[Event]:
        """Yield the events since the last call. The end of a save comes after all its other events."""
        progress = self.handle.progress
        where = (self.step, self.uri, self.rank)
        if not self.staged:
            self.staged = True
            yield Staged(*where, self.blocked)
        if ended and (error := self.handle.error) is not None:
            yield Failed(*where, error)
            return
        if not self.planned and (ended or progress.phase in _PLANNED):
            self.planned = True
            yield Planned(*where, progress.bytes_total)
        if not self.uploaded and (ended or progress.phase in _UPLOADED):
            self.uploaded = True
            yield Uploaded(*where, progress.bytes_total)
        if ended and not self.handle.cancelled():
            info = self.handle.result()
            yield Committed(*where, info)
            if steps := self.pruned():
                yield Pruned(*where, steps)


class Watch:
    """Follows saves until they have ended. Its thread lives as long as one is under way.

    Args:
        on_event: called with every event, on the thread; its exceptions are logged, and have no other effect.
        rank: returns the rank of this process.
        display: returns what shows the progress of saves, None where nothing does.
        story: logs a line for each save and load.
    """

    def __init__(
        self,
        on_event: OnEvent | None,
        rank: Callable[[], int],
        display: Callable[[], Display | None],
        story: Story,
    ) -> None:
        self.story = story
        self._on_event = on_event
        self._rank = rank
        self._display = display
        self._owner = Owner("this Checkpointer")
        self._changed = threading.Condition()
        self._saves: list[_Save] = []
        self._thread: threading.Thread | None = None

    def follow(
        self,
        step: int,
        uri: str,
        handle: SaveHandle[CheckpointInfo],
        *,
        blocked: float,
        pruned: Callable[[], tuple[int, ...]],
        blocking: bool = False,
    ) -> None:
        """Report this save from here on.

        Args:
            step: its number.
            uri: where its checkpoint will be.
            handle: its handle.
            blocked: seconds that its snapshot took.
            pruned: returns the steps that retention deleted, once it is committed.
            blocking: training waits until it is committed.
        """
        self.story.follow(step, handle, None if blocking else blocked)
        if self._on_event is None and self._display() is None:
            return
        with self._changed:
            self._saves.append(_Save(step, uri, self._rank(), handle, blocked, pruned))
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="cloudckpt-watch", daemon=True)
                try:
                    system_limits.start(thread)
                    self._thread = thread
                except ExecutorError as error:  # `finish` tells of it, or the thread of a later save
                    _log.warning("the outcome of step %d is reported later: %s", step, error)
            self._changed.notify()
        handle.add_done_callback(lambda _: self._wake())

    def tell(self, event: Event) -> None:
        """Hand an event over."""
        _log.debug("%s", event)
        if isinstance(event, Loaded):
            self.story.loaded(event)
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception:  # noqa: BLE001 - an exception of a user's function is logged, and fails no save
            _log.exception("on_event raised; the checkpoints are not concerned")

    def finish(self) -> None:
        """Wait until all events of saves were sent, also of those in progress.

        A process that was forked from the owner has nothing to tell.
        """
        if self._owner.is_elsewhere:
            return
        with self._changed:
            thread = self._thread
        if thread is None:
            self._run()
        elif thread is not threading.current_thread():
            thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._saves:
                    self._thread = None
                    return
                saves = list(self._saves)
                if not any(save.handle.done() for save in saves):
                    self._changed.wait(_LOOK)
            for save in saves:
                ended = save.handle.done()
                for event in save.news(ended=ended):
                    self.tell(event)
                self._show(save, ended=ended)
                if ended:
                    with self._changed:
                        self._saves.remove(save)

    def _show(self, save: _Save, *, ended: bool) -> None:
        shown = self._display()
        if shown is None:
            return
        name = f"step {save.step}, rank {save.rank}"
        if ended:
            shown.end(name)
        else:
            progress = save.handle.progress
            shown.show(name, progress.phase, progress.bytes_done, progress.bytes_total)
