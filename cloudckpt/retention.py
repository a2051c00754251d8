"""Retention: the rules for the steps that stay, and a writer that deletes the others after its commit.

Retention never deletes the newest step, the step just saved, the step that the job loaded, a pinned one, or
one on which another process holds a read lease.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.manage.delete import delete_remains, delete_set_aside, delete_unread
from cloudckpt.backends.save import stale_attempts
from cloudckpt.backends.save.writer import StorageWriter
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.system import background_log
from cloudckpt.backends.system.printable import one_line
from cloudckpt.run import Entry, Run

_log = background_log.logger(__name__)

_METRIC = "metric"
"""The note by which ``keep_best`` goes."""
_PRUNED = "cloudckpt_pruned"
_OF_RUN = ("_run", "_step", "_retention", "_loaded", "_own", "_clears")
"""Fields of a PruningWriter that a StorageWriter does not have."""
_SET_ASIDE_FOR = timedelta(days=1)
"""The age from which on retention deletes a step that was set aside; gc's own by default."""


@dataclass(frozen=True, slots=True)
class Retention:
    """Keep the newest ``keep_last`` steps, and beyond them those that are worth it.

    These are the multiples of ``keep_every``, or, where that is a time, each that was committed so long after
    the one kept before it; and the ``keep_best`` steps with the highest metric, the newer of two that are as
    good. Pinned steps stay and are not counted. With ``keep_last=None`` every step stays.

    Raises:
        ConfigurationError: a number can't be used.
    """

    keep_last: int | None = None
    keep_every: int | timedelta | None = None
    keep_best: int | None = None

    def __post_init__(self) -> None:
        names = ["keep_last", "keep_every", "keep_best"]
        if isinstance(self.keep_every, timedelta):
            if self.keep_every <= timedelta(0):
                raise ConfigurationError(f"keep_every is {self.keep_every}", hint="Give more time than none")
            names.remove("keep_every")
        for name in names:
            value: object = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigurationError(
                    f"{name} is {value!r}", hint="Give a whole number from 1 on, or None"
                )
        for name in ("keep_every", "keep_best"):
            if getattr(self, name) is not None and self.keep_last is None:
                raise ConfigurationError(
                    f"{name} says which steps outlive keep_last, and that is not given",
                    hint="Give keep_last, too; without it every step stays",
                )

    @property
    def rules(self) -> dict[str, object]:
        """The rules that are set, by the names of their arguments."""
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) is not None}

    def check_metric(self, metric: float | None) -> None:
        """Refuse a metric by which steps can't be ordered, and its absence where ``keep_best`` needs one.

        Raises:
            ConfigurationError: it is NaN, or missing.
        """
        if metric is not None and math.isnan(float(metric)):
            raise ConfigurationError(
                "metric is NaN, which is neither better nor worse than any other",
                hint="Give a number, or leave metric out of this save"
                if self.keep_best is None
                else "Give a number: -math.inf marks a step as the worst",
            )
        if metric is None and self.keep_best is not None:
            raise ConfigurationError(
                f"keep_best={self.keep_best} needs a metric, and this save has none",
                hint="Pass metric= to save and async_save, the higher the better, or leave keep_best out",
            )

    def superseded(
        self,
        committed: Mapping[int, Entry],
        metric_of: Callable[[int], float | None] = lambda _: None,
        protected: Collection[int] = (),
    ) -> list[int]:
        """Return the committed steps that retention deletes, oldest first; never the newest.

        Args:
            committed: entries of the committed steps.
            metric_of: returns the metric of a step; None and NaN are none. For ``keep_best`` alone.
            protected: steps that stay in addition.
        """
        if self.keep_last is None:
            return []
        ordered = sorted(step for step, one in committed.items() if not one.pinned)
        milestones = self._milestones(ordered, committed)
        kept = milestones | {*protected} | {step for step, one in committed.items() if one.loading}
        old = [step for step in ordered[: -self.keep_last] if step not in kept]
        if not old or self.keep_best is None:
            return old
        metrics = {step: metric for step in ordered if (metric := metric_of(step)) is not None}
        known = [step for step, metric in metrics.items() if not math.isnan(metric)]
        best = sorted(known, key=lambda step: (metrics[step], step))[-self.keep_best :]
        return [step for step in old if step not in best]

    def relied_on(self, committed: Mapping[int, Entry], gone: Collection[int]) -> set[int]:
        """Return the steps without which some of ``gone`` would stay."""
        ordered = sorted(step for step, one in committed.items() if not one.pinned)
        relied = {*ordered[-(self.keep_last or 0) :]}
        if isinstance(self.keep_every, timedelta):
            for step in gone:
                relied |= {*[kept for kept in ordered if kept < step and kept not in gone][-1:]}
        return relied

    def _milestones(self, ordered: Sequence[int], committed: Mapping[int, Entry]) -> set[int]:
        """Return the steps of ``keep_every``. A time chooses the same ones with any steps in between."""
        every = self.keep_every
        if every is None:
            return set()
        if isinstance(every, int):
            return {step for step in ordered if step % every == 0}
        kept: set[int] = set()
        last: datetime | None = None
        for step in ordered:
            # A step whose time the store doesn't tell stays: nothing says that it may go.
            at = committed[step].modified
            if at is None or last is None or at - last >= every:
                kept.add(step)
                last = at or last
        return kept


class PruningWriter(StorageWriter):
    """A StorageWriter of one step that deletes superseded steps after its commit.

    It does so where ``finish`` runs: on the coordinator, and in the background where the save is there. A
    step that could not be deleted is no failure of the save; the next save tries again.

    Args:
        run: the run.
        step: its step to write.
        retention: which steps stay.
        loaded: the step that the job loaded, which stays.
        own: newer steps below which this one may be saved: the job resumed from the newest step and has saved
            them itself.
        metric: of the step.
        overwrite: replace the step where it is committed, and write it where a newer one is.
        clears: remove what dead attempts have left, after the commit.

    Raises:
        ConfigurationError: the metric can't be used, or is missing.
    """

    def __init__(
        self,
        run: Run,
        step: int,
        retention: Retention,
        *,
        loaded: int | None = None,
        own: frozenset[int] = frozenset(),
        metric: float | None = None,
        overwrite: bool = False,
        clears: bool = False,
    ) -> None:
        notes = {} if metric is None else {_METRIC: metric}
        super().__init__(run.at(step), overwrite=overwrite, notes=notes)
        self._run, self._step, self._retention, self._loaded = run, step, retention, loaded
        self._own, self._clears = own, clears

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: self.__dict__[name] for name in _OF_RUN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in _OF_RUN:
            setattr(self, name, state[name])

    def _looks(self, store: ObjectStore) -> list[Callable[[], None]]:
        looks = super()._looks(store)
        return looks if self._overwrite else [*looks, self._check_newest]

    def _check_newest(self) -> None:
        """Refuse a step below the newest: the next load would return to that one.

        Raises:
            ConfigurationError: a newer step is committed that is not one of the job's own.
        """
        newer = self._run.newer(self._step)
        if newer and self._own.issuperset(newer):
            what = "step %d is saved below the newest step, %d, which a resumed job would load"
            _log.warning(what, self._step, newer[-1])
        elif newer:
            raise ConfigurationError(
                f"step {self._step} is below the newest committed step, {newer[-1]}, which a resumed "
                "job would load",
                uri=self._run.target.uri,
                rank=self._rank,
                hint="To go back, call load(state, step=..., discard_newer=True) or rollback(step). "
                "overwrite=True saves the step all the same",
            )

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        if self._clears:
            self._clear()
        try:
            # Goes to every rank with the metadata, which is stored already.
            pruned = prune(self._run, self._retention, _steps(self._step, self._loaded))
            metadata.__dict__[_PRUNED] = tuple(pruned)
        except Exception as error:  # noqa: BLE001 - of any class: the save is committed
            said = f"{type(error).__name__}: {error}"
            _log.warning("the save is committed; older steps stay until the next one: %s", one_line(said))

    def _clear(self) -> None:
        """Remove what attempts left that died before this save."""
        try:
            with open_store(self._run.target) as store:
                removed = stale_attempts.remove_dead(store, self._run.folder(self._step))
        except Exception as error:  # noqa: BLE001 - of any class: the save is committed
            what = "the save is committed; what dead saves have left stays until gc removes it: %s"
            _log.warning(what, one_line(error))
            return
        if removed:
            where, such = one_line(self._run.target.uri), one_line(removed[0])
            _log.info(
                "removed %d objects and uploads that dead saves left in %s: %s", len(removed), where, such
            )


def with_metric(
    make: Callable[..., PruningWriter], retention: Retention, metric: float | None
) -> tuple[PruningWriter, BaseException | None]:
    """Make a writer with a metric, or one without it and the error that the metric raised.

    The metric may be wrong on one rank alone. The error belongs to the save, which every rank joins.
    """
    try:
        writer = make(metric=metric)
        retention.check_metric(metric)
    except BaseException as error:  # noqa: BLE001 - the caller raises it
        return make(), error
    return writer, None


def _steps(*steps: int | None) -> frozenset[int]:
    return frozenset(step for step in steps if step is not None)


def pruned_by(metadata: Metadata) -> tuple[int, ...]:
    """Return the steps that the save which returned this metadata has deleted."""
    steps: tuple[int, ...] = metadata.__dict__.get(_PRUNED, ())
    return steps


def prune(run: Run, retention: Retention, protected: Collection[int] = ()) -> list[int]:
    """Delete the superseded steps of a run, and return them.

    Also deletes what was set aside more than a day ago, but for pinned steps, and what is left of deletions
    that were cut off.

    Args:
        run: the run.
        retention: which steps stay.
        protected: steps that stay in addition.

    Raises:
        StorageError: the store could not list or delete; those deleted before are gone.
    """
    if retention.keep_last is None:
        return []
    started = run.started()
    committed = {step: one for step, one in started.items() if one.state == "committed"}
    gone = [step for step in superseded(run, committed, retention, protected) if drop(run, step)]
    newest = max(committed, default=0)
    before = datetime.now(UTC) - _SET_ASIDE_FOR
    for step, one in started.items():
        if step < newest and one.state == "unfinished" and one.objects:
            delete_remains(run.at(step))  # where a deletion before this one was cut off
        if one.set_aside is not None and one.set_aside <= before and not one.pinned:
            delete_set_aside(run.at(step), before)
    return gone


def superseded(
    run: Run, committed: Mapping[int, Entry], retention: Retention, protected: Collection[int] = ()
) -> list[int]:
    """Return the committed steps of a run that its retention deletes, by the metrics stored with them.

    Args:
        run: the run.
        committed: what a listing shows, which may be of steps that were deleted since.
        retention: which steps stay.
        protected: steps that stay in addition.

    Raises:
        StorageError: the store could not be read.
    """
    found, confirmed = dict(committed), set[int]()
    while True:
        gone = retention.superseded(found, lambda step: run.note(step, _METRIC), protected)
        # Steps that stay in place of those: one that is not there any more would stand for none.
        asked = retention.relied_on(found, gone) - confirmed if gone else set[int]()
        if not asked:
            return gone
        there = run.among(asked)
        confirmed |= there
        found = {step: one for step, one in found.items() if step in there or step not in asked}


def drop(run: Run, step: int) -> bool:
    """Delete one step of a run.

    Returns:
        False if a process is loading it, or another process has deleted it.

    Raises:
        StorageError: the store could not be read, or not delete.
    """
    deleted = delete_unread(run.at(step))
    if deleted:
        _log.info("deleted step %d of %s", step, one_line(run.target.uri))
    return deleted
