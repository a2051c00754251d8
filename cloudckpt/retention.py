"""Which steps of a run stay, and a writer that deletes the others once its own checkpoint is committed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from cloudckpt.backends import attempts, background_log
from cloudckpt.backends.delete import delete_checkpoint
from cloudckpt.backends.errors import CheckpointNotFoundError, ConfigurationError
from cloudckpt.backends.printable import one_line
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.writer import StorageWriter
from cloudckpt.run import Entry, Run

_log = background_log.logger(__name__)

_METRIC = "metric"
"""The note by which ``keep_best`` goes."""
_PRUNED = "cloudckpt_pruned"


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

    def superseded(
        self, committed: Mapping[int, Entry], metric_of: Callable[[int], float | None] = lambda _: None
    ) -> list[int]:
        """Those of the committed steps that go, oldest first; never the newest.

        ``metric_of`` is asked for every step's metric where ``keep_best`` is given; None and NaN are none.
        """
        if self.keep_last is None:
            return []
        ordered = sorted(step for step, one in committed.items() if not one.pinned)
        milestones = self._milestones(ordered, committed)
        old = [step for step in ordered[: -self.keep_last] if step not in milestones]
        if not old or self.keep_best is None:
            return old
        metrics = {step: metric for step in ordered if (metric := metric_of(step)) is not None}
        known = [step for step, metric in metrics.items() if not math.isnan(metric)]
        best = sorted(known, key=lambda step: (metrics[step], step))[-self.keep_best :]
        return [step for step in old if step not in best]

    def _milestones(self, ordered: Sequence[int], committed: Mapping[int, Entry]) -> set[int]:
        """The steps that ``keep_every`` is about; of times, the same ones whatever went in between."""
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
    """A StorageWriter of one step, which after the commit deletes the steps that its retention lets go.

    It does so where ``finish`` runs: on the coordinator, and in the background where the save is there. A
    step that could not be deleted is no failure of the save; the next save tries again.
    """

    def __init__(
        self,
        run: Run,
        step: int,
        retention: Retention,
        *,
        metric: float | None = None,
        overwrite: bool = False,
        clears: bool = False,
    ) -> None:
        notes = {} if metric is None else {_METRIC: metric}
        super().__init__(run.at(step), overwrite=overwrite, notes=notes)
        self._run, self._retention = run, retention
        self._folder = run.folder(step)
        self._clears = clears

    def __getstate__(self) -> dict[str, Any]:
        own = {"folder": self._folder, "clears": self._clears}
        return super().__getstate__() | {"run": self._run, "retention": self._retention} | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._run, self._retention = state["run"], state["retention"]
        self._folder, self._clears = state["folder"], state["clears"]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        if self._clears:
            self._clear()
        try:
            # Goes to every rank with the metadata, which is stored already.
            metadata.__dict__[_PRUNED] = tuple(prune(self._run, self._retention))
        except Exception as error:  # noqa: BLE001 - of whatever class: the save is committed
            said = f"{type(error).__name__}: {error}"
            _log.warning("the save is committed; older steps stay until the next one: %s", one_line(said))

    def _clear(self) -> None:
        """Remove what attempts left that died before this save."""
        try:
            with open_store(self._run.target) as store:
                removed = attempts.remove_dead(store, self._folder)
        except Exception as error:  # noqa: BLE001 - of whatever class: the save is committed
            what = "the save is committed; what dead saves have left stays until gc removes it: %s"
            _log.warning(what, one_line(error))
            return
        if removed:
            where, such = one_line(self._run.target.uri), one_line(removed[0])
            _log.info(
                "removed %d objects and uploads that dead saves left in %s: %s", len(removed), where, such
            )


def with_metric(
    make: Callable[..., PruningWriter], metric: float | None
) -> tuple[PruningWriter, BaseException | None]:
    """Make a writer with a metric, or one without it and the error that the metric raised.

    The metric may be wrong on one rank alone. The error belongs to the save, which every rank joins.
    """
    try:
        return make(metric=metric), None
    except BaseException as error:  # noqa: BLE001 - the caller raises it
        return make(), error


def pruned_by(metadata: Metadata) -> tuple[int, ...]:
    """The steps that the save which returned this metadata has let go."""
    steps: tuple[int, ...] = metadata.__dict__.get(_PRUNED, ())
    return steps


def prune(run: Run, retention: Retention) -> list[int]:
    """Delete the steps of a run that its retention lets go, and return them.

    Raises:
        StorageError: the store could not list or delete; those deleted before are gone.
    """
    if retention.keep_last is None:
        return []
    begun = run.begun()
    committed = {step: one for step, one in begun.items() if one.state == "committed"}
    gone = superseded(run, committed, retention)
    for step in gone:
        drop(run, step)
    newest = max(committed, default=0)
    for step, one in begun.items():
        if step < newest and one.state == "unfinished" and one.objects:
            run.sweep(step)  # where a deletion before this one was cut off
    return gone


def superseded(run: Run, committed: Mapping[int, Entry], retention: Retention) -> list[int]:
    """Those of a run's committed steps that its retention lets go, by the metrics stored with them."""
    return retention.superseded(committed, lambda step: run.note(step, _METRIC))


def drop(run: Run, step: int) -> None:
    """Delete one step of a run, where no other was faster.

    Raises:
        StorageError: the store could not be read, or not delete.
    """
    try:
        delete_checkpoint(run.at(step))
    except CheckpointNotFoundError:  # another was faster
        return
    _log.info("deleted step %d of %s", step, one_line(run.target.uri))
