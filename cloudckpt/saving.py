"""Saving a step of a run with the executor: its writer, its handle and what follows the commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from cloudckpt.backends.format import metadata as md
from cloudckpt.events import CheckpointInfo
from cloudckpt.executor import ProcessExecutor, SaveHandle
from cloudckpt.executor.coordination.rendezvous import grouped
from cloudckpt.executor.worker.rank_conflicts import RankConflicts
from cloudckpt.pending_saves import Saves
from cloudckpt.retention import PruningWriter, Retention, pruned_by, with_metric
from cloudckpt.run import Run
from cloudckpt.save_monitor import Watch
from cloudckpt.schedule import Schedule
from cloudckpt.state.app_state import AppState


@dataclass(slots=True)
class Saving:
    """Starts the saves of a Checkpointer.

    Args:
        run: whose steps are saved.
        retention: deletes older steps after each commit.
        executor: saves in the background.
        watch: reports each save.
        saves: remembers each save until its end was observed.
        schedule: notes when each save begins.
        state: wraps a state to save.
        group: the ranks; None for all of them.
        overwrite: replace a step that is committed already.
        rank_conflicts: what becomes of values that differ between ranks.
        loaded: the step that this job loaded, which retention keeps.
        resumed: True if that was the newest step.
    """

    run: Run
    retention: Retention
    executor: ProcessExecutor
    watch: Watch
    saves: Saves
    schedule: Schedule
    state: Callable[[Mapping[str, Any]], AppState]
    group: dist.ProcessGroup | None
    overwrite: bool
    rank_conflicts: RankConflicts
    loaded: int | None = None
    resumed: bool = False
    _saved: set[int] = field(default_factory=set)
    """Steps that this Checkpointer has started to save."""

    @property
    def last(self) -> int | None:
        """The highest step that this Checkpointer has started to save, or has loaded; None before."""
        return max((*self._saved, *(() if self.loaded is None else (self.loaded,))), default=None)

    def begin(
        self, step: int, state_dict: Mapping[str, Any], metric: float | None, *, blocking: bool = False
    ) -> SaveHandle[CheckpointInfo]:
        """Take a snapshot of the state and save it in the background, as ``Checkpointer.async_save``.

        ``blocking`` tells that the caller waits for the commit, as ``Checkpointer.save`` does.

        Raises:
            Exception: a ``state_dict()`` of the state raised it, in a single process.
        """
        make_writer = partial(
            PruningWriter,
            self.run,
            step,
            self.retention,
            loaded=self.loaded,
            own=frozenset(self._saved) if self.resumed else frozenset(),
            overwrite=self.overwrite,
            clears=self.saves.clears,
        )
        writer, problem = with_metric(make_writer, self.retention, metric)
        self._saved.add(step)
        uri = writer.checkpoint_id
        self.watch.story.begin()
        began = self.schedule.begin()
        ended: list[tuple[float, datetime]] = []
        pruned: list[int] = []

        def describe(metadata: Metadata) -> CheckpointInfo:
            sizes = md.sizes_of(metadata)
            # A thread that waits for the handle may wake before the callbacks are called.
            done, when = ended[0] if ended else (time.monotonic(), datetime.now(UTC))
            pruned.extend(pruned_by(metadata))
            return CheckpointInfo(step, uri, sum(sizes.values()), len(sizes), done - began, when)

        def begun(handle: SaveHandle[CheckpointInfo]) -> None:
            handle.add_done_callback(lambda _: ended.append((time.monotonic(), datetime.now(UTC))))
            self.saves.add(step, handle)

        def described() -> dict[str, Any]:
            if problem is not None:
                raise problem
            return self.state(state_dict).describe()

        handle = self.executor.submit(
            # With other ranks the handle raises what this does, on all of them.
            described if grouped() else described(),
            describe,
            begun=begun,
            subject=f"the save of step {step} of {self.run.target.uri}",
            rank_conflicts=self.rank_conflicts,
            storage_writer=writer,
            process_group=self.group,
            no_dist=not grouped(),
        )
        if handle.staged.done() and not handle.cancelled():
            blocked = time.monotonic() - began
            self.watch.follow(
                step, uri, handle, blocked=blocked, pruned=lambda: tuple(pruned), blocking=blocking
            )
        return handle
