"""The Checkpointer: a whole run's checkpoints, by step."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import torch.distributed as dist

from cloudckpt.backends.config.options import true_or_false
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.system import background_log
from cloudckpt.backends.system.printable import one_line
from cloudckpt.events import CheckpointInfo, Loaded, OnEvent
from cloudckpt.executor import ProcessExecutor, SaveHandle
from cloudckpt.executor.coordination import remote_errors
from cloudckpt.executor.coordination.rendezvous import grouped
from cloudckpt.executor.forks import Unpicklable
from cloudckpt.executor.network.network_options import PortRange
from cloudckpt.executor.process_executor import OnBusy
from cloudckpt.executor.save_handle import skipped
from cloudckpt.executor.worker.rank_conflicts import checked as rank_conflicts_checked
from cloudckpt.loading import Loading
from cloudckpt.pending_saves import OnFailure, Saves
from cloudckpt.preemption import Preemption
from cloudckpt.progress import RankZeroDisplay
from cloudckpt.rank_broadcast import agreed, group_size, own_rank
from cloudckpt.rank_calls import Calls, spelled
from cloudckpt.read_ahead import ReadAhead
from cloudckpt.retention import Retention
from cloudckpt.run import Run
from cloudckpt.save_monitor import Watch
from cloudckpt.saving import Saving
from cloudckpt.schedule import Schedule
from cloudckpt.state.app_state import AppState
from cloudckpt.story import Story

_log = background_log.logger(__name__)


class Checkpointer(Unpicklable):
    """Saves and loads the steps of one run, in the background and with every rank.

    Each step is a folder below the run's URI, which exists when its commit does. Every rank makes a
    Checkpointer and calls its methods alike; without ``torch.distributed`` it works in a single process.

    A state is a dict of modules, optimizers, objects with ``state_dict`` and ``load_state_dict``, tensors and
    values, in dicts, lists and tuples. What a save accepts is restored exactly, and all else is refused.

    Args:
        uri: the run, such as ``s3://bucket/run``; options may stand in its query.
        keep_last: steps to keep; older ones are deleted in the background, once a newer one is committed.
            None keeps all.
        keep_every: steps that are a multiple of it are kept beyond ``keep_last``; of a time, one that was
            committed in each.
        keep_best: so many steps with the highest ``metric`` are kept beyond ``keep_last``.
        every_steps: `async_save` saves steps that are a multiple of it, and skips the others.
        every_seconds: `async_save` saves so many seconds after the save before began, by rank 0's clock; with
            ``every_steps``, when either says so.
        on_failure: a failed save whose handle was not observed is raised by the next call (``"raise"``) or
            logged (``"warn"``).
        snapshots: states that may be held at once: 1, or 2 to take one while the one before is saved.
        on_busy: ``"wait"``, ``"skip"`` or ``"raise"`` where no snapshot is free.
        save_timeout: seconds that a save may take.
        start_timeout: seconds that ranks wait for each other.
        progress: show on rank 0 how far saves and loads are, by tqdm's bars or every ten seconds in the log,
            and one line for each save and load: on standard error where logging is not configured.
        interface: by which the checkpoint processes reach each other, as ``"eth1"``, ``"10.0.3.7"`` or
            ``"10.0.0.0/8"``; by default ``CLOUDCKPT_INTERFACE``, ``GLOO_SOCKET_IFNAME``, or the address from
            which a rank reaches training's store.
        port_range: the first and last port that they may listen on, as ``"29600-29699"``; by default
            ``CLOUDCKPT_PORT_RANGE``, or any port.
        preemption_grace: seconds that are left after SIGTERM or SIGUSR1. The ranks save the step of a call on
            which they agree, and raise `Preempted`, which ends the process. None leaves signals alone; so
            does a handler that somebody else has put.
        on_event: gets each `cloudckpt.events.Event`, on every rank, on a thread of its own.
        process_group: the ranks; by default all of them. ``load`` and the questions about steps use its
            collectives, saves do not.
        trust: let checkpoints run code of their writers, as stock DCP always does.
        overwrite: replace a step that is committed already, and save below the newest step.
        rank_conflicts: what a save does with a name whose value differs between ranks: ``"error"`` refuses
            it, ``"warn"`` logs it, and a list has patterns of names that may differ, as ``["*.expert.*"]``.
            The lowest rank's value is saved then. `PerRank` saves each rank's.
        options: of the URI, as in the table of options.

    Raises:
        ConfigurationError: an argument can't be used.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        *,
        keep_last: int | None = None,
        keep_every: int | timedelta | None = None,
        keep_best: int | None = None,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        on_failure: OnFailure = "raise",
        snapshots: int = 1,
        on_busy: OnBusy = "wait",
        save_timeout: float = 1800.0,
        start_timeout: float = 300.0,
        preemption_grace: float | None = 25.0,
        progress: bool = True,
        interface: str | None = None,
        port_range: PortRange | None = None,
        on_event: OnEvent | None = None,
        process_group: dist.ProcessGroup | None = None,
        trust: bool = False,
        overwrite: bool = False,
        rank_conflicts: Literal["error", "warn"] | Sequence[str] = "error",
        **options: Any,
    ) -> None:
        self._run = Run(Target.given("Checkpointer", uri, options))
        retention = Retention(keep_last, keep_every, keep_best)
        self._schedule = Schedule(every_steps, every_seconds)
        self._rank = rank = partial(own_rank, process_group)  # the group may be there only later
        self._saves = Saves(on_failure, rank)
        self._group = process_group
        self._trust = true_or_false("trust", trust)
        self._executor = ProcessExecutor(
            save_timeout,
            start_timeout,
            snapshots=snapshots,
            on_busy=on_busy,
            interface=interface,
            port_range=port_range,
            use_prefix_store=False if os.environ.get("DCP_USE_PREFIX_STORE") == "0" else None,
        )
        self._calls = Calls(self._executor, process_group, self.uri)
        self._display = RankZeroDisplay(true_or_false("progress", progress), rank)
        story = Story(self.uri, partial(group_size, process_group), rank, retention.rules, shown=progress)
        self._watch = Watch(on_event, rank, self._display, story)
        self._state = partial(AppState, group=process_group, trust=self._trust)
        self._ahead = ReadAhead(self._run, rank, self._trust)
        self._preemption = Preemption(preemption_grace, rank)
        self._saving = Saving(
            self._run,
            retention,
            self._executor,
            self._watch,
            self._saves,
            self._schedule,
            self._state,
            group=process_group,
            overwrite=true_or_false("overwrite", overwrite),
            rank_conflicts=rank_conflicts_checked(rank_conflicts),
        )

    @property
    def uri(self) -> str:
        """The run, without options."""
        return self._run.target.uri

    def warmup(self, state_dict: Mapping[str, Any] | None = None) -> None:
        """Prove the store, start the checkpoint processes and have them meet, before step 0.

        A state that can't be saved is refused. The memory of its snapshot is made ready: the first save is
        then as short as the others.

        Raises:
            ConfigurationError: the state holds what can't be restored.
            StorageError: the run can't be written to, or not read.
            ExecutorError: a rank is missing, or the processes can't reach each other.
        """
        self._preemption.start()
        self._calls.agreed(f"warmup({'' if state_dict is None else 'state_dict'})", self._run.prove)
        self._watch.story.begin()
        self._executor.warmup(
            None if state_dict is None else lambda: self._state(state_dict).plan(),
            process_group=self._group,
            no_dist=not grouped(),
        )

    def async_save(
        self, step: int, state_dict: Mapping[str, Any], *, metric: float | None = None
    ) -> SaveHandle[CheckpointInfo]:
        """Take a snapshot of the state, return, and save it in the background.

        The state may change as soon as this returns. A step that ``every_steps`` and ``every_seconds`` leave
        out, or ``on_busy`` skips, has a handle that is ``cancelled()``.

        Args:
            step: its number.
            state_dict: what to save.
            metric: how good it is, for ``keep_best``: the higher the better. It is stored with the step.

        Raises:
            ConfigurationError: the step is no number of one.
            CheckpointError: an earlier save failed in the background, and its failure was not observed.
            Exception: a ``state_dict()`` of the state raised it, in a single process. With several ranks the
                handle raises it, on each.
            Preempted: the job is preempted, and this was its last step.
        """
        step = self._run.number(step)
        name = f"async_save({step})"
        self._pass(step, state_dict, metric, name)
        if not self._schedule.is_due(step, self._calls.broadcast_bool(name, "due")):
            return skipped()
        self._saves.raise_unobserved(self._calls.broadcast_bool(name, "unobserved"))
        return self._saving.begin(step, state_dict, metric)

    def save(
        self, step: int, state_dict: Mapping[str, Any], *, metric: float | None = None
    ) -> CheckpointInfo:
        """Save and return when the step is committed, regardless of ``every_steps`` and ``every_seconds``.

        Raises:
            CheckpointExistsError: it is committed already, and ``overwrite`` is off.
            CheckpointError: what failed the save, on whichever rank.
            Preempted: the job is preempted, and this was its last step.
        """
        step = self._run.number(step)
        self._pass(step, state_dict, metric, f"save({step})")
        return self._saving.begin(step, state_dict, metric, blocking=True).result()

    def load(
        self,
        state_dict: Mapping[str, Any],
        step: int | None = None,
        *,
        fallback: bool = False,
        discard_newer: bool = False,
    ) -> int:
        """Load a step into the state, and return its number; by default the newest that is committed.

        Waits for this run's own saves first. Tensors, modules and optimizers are loaded in place; dicts and
        lists become what was saved. What the state does not ask for is not read, and logged.

        Args:
            state_dict: like the one that was saved.
            step: which one, the same on every rank.
            fallback: where the newest proves damaged, load the one before it, and so on. Damaged steps are
                set aside then: their objects are kept, and their numbers may be saved again.
            discard_newer: once the step is loaded, make it the newest, as `rollback` does. Without it, a
                save below the newest step is refused.

        Raises:
            CheckpointNotFoundError: there is no such step, or none at all.
            ConfigurationError: the state asks for what the step does not have, or has in another size.
            IntegrityError: it is damaged. Parts of the state may have been loaded.
        """

        def begin() -> AppState:
            state = self._state(state_dict)
            self._settle()
            return state

        self._calls.meet("load()")  # the step is compared with rank 0's choice
        loading = Loading(self._run, self._group, self._rank(), self._trust, self._display(), self._ahead)
        state, first = loading.begin(begin, step, self._saving.last)
        chosen = first
        began = time.monotonic()
        if step is None:
            chosen, uri = loading.load_newest(state, chosen, fallback=fallback)
        else:
            uri = loading.load(state, chosen, asked=step)
        took, instead_of = time.monotonic() - began, first if first != chosen else None
        if discard_newer:
            agreed(lambda: self._run.roll_back(chosen), self._group)
        self._saving.loaded, self._saving.resumed = chosen, loading.is_newest or discard_newer
        self._watch.tell(Loaded(chosen, uri, self._rank(), took, loading.size, instead_of))
        return chosen

    def rollback(self, step: int) -> list[int]:
        """Make a committed step the newest. Every rank calls it, and no other job may save to this run.

        Newer steps are set aside: readers see them no more, their numbers may be saved again, and their
        objects are kept for a day. ``cloudckpt gc`` or retention deletes them then, unless they are pinned.
        The newest is set aside last: a reader finds either it or ``step`` to be the newest.

        Args:
            step: its number.

        Returns:
            The steps that were set aside, in order.

        Raises:
            CheckpointNotFoundError: there is no such step.
            StorageError: the store could not be read or written. The newest step is the one of before.
        """
        self._settle()
        return self._calls.agreed(f"rollback({spelled(step)})", lambda: self._run.roll_back(step))

    def latest_step(self) -> int | None:
        """Return the newest committed step of any job; None where there is none. The same on every rank."""
        return self._calls.agreed("latest_step()", self._run.newest)

    def all_steps(self) -> list[int]:
        """Every committed step, in order. Alike on every rank."""
        return self._calls.agreed("all_steps()", self._run.steps)

    def pin(self, step: int) -> None:
        """Keep a committed step from retention. Every rank calls it.

        Raises:
            CheckpointNotFoundError: there is no such step.
        """
        self._calls.agreed(f"pin({spelled(step)})", lambda: self._run.pin(step))

    def unpin(self, step: int) -> None:
        """Leave a step to ``keep_last`` and the others again. Every rank calls it."""
        self._calls.agreed(f"unpin({spelled(step)})", lambda: self._run.unpin(step))

    def wait(self) -> None:
        """Wait for every save under way. Every rank calls it.

        Raises:
            CheckpointError: one failed, and its failure was not observed.
            ExecutorError: a rank did not come within ``start_timeout``.
        """

        def ended_badly() -> bool:
            self._settle()
            return self._saves.ended_badly

        self._saves.raise_alike(self._calls.confer("wait()", ended_badly))

    def preempt(self) -> None:
        """Have every rank save its next step as the last, as at a SIGTERM: for notices that are no signals.

        From any thread, on one rank or several; returns at once.

        Raises:
            ConfigurationError: ``preemption_grace`` is None.
        """
        self._executor.check_owner("preempt()")
        self._preemption.tell("SIGTERM")

    def close(self) -> None:
        """Wait for every save, and end the checkpoint process.

        After a notice of preemption it waits no longer than the grace time allows.

        Raises:
            CheckpointError: a save failed, and its failure was not observed.
        """
        self._close(deliver=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self._close(deliver=False)
        except remote_errors.ANY as failed:  # what ended the block is raised
            _log.log(background_log.warning_on(self._rank()), "%s", one_line(failed))

    def _close(self, *, deliver: bool) -> None:
        if self._executor.is_elsewhere:
            return  # a forked child: the saves are its parent's
        self._executor.close(self._preemption.remaining)
        self._watch.finish()
        self._ahead.close()
        try:
            self._saves.raise_own()
        finally:
            self._preemption.close(deliver=deliver)

    def _pass(self, step: int, state_dict: Mapping[str, Any], metric: float | None, name: str) -> None:
        """Let a call go on, unless its step is none, or is the last of the job."""
        if not self._preemption.passes(self._calls.final_step(name)):
            self._end(step, state_dict, metric)

    def _end(self, step: int, state_dict: Mapping[str, Any], metric: float | None) -> NoReturn:
        """Save the last step in the time that is left, or give up, and raise what ends the process."""
        self._preemption.act()
        info: CheckpointInfo | None = None
        try:
            if not self._saves.settle(self._preemption.remaining):
                raise TimeoutError("the saves before it took too long")
            info = self._saving.begin(step, state_dict, metric).result(self._preemption.remaining)
            _log.warning("the last step, %d, is committed", step)
        except remote_errors.ANY as error:
            _log.warning("the last step, %d, is given up, what was committed stays: %s", step, error)
        raise self._preemption.ended(step, info)

    def _settle(self) -> None:
        """Wait for every save under way, however it ends."""
        self._saves.settle()
        self._watch.finish()
