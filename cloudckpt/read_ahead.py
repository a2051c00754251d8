"""The step to load, chosen on rank 0: its lease and its metadata are requested before it is certain.

A listing tells which step is the newest. In the same round trip the step that this process saved or loaded
last is asked for, which usually is the newest. An explicit step needs no listing before it is read: whether a
newer one is committed is found out beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Final

from cloudckpt.backends.errors import CheckpointNotFoundError, IntegrityError
from cloudckpt.backends.load.read_lease import put_lease
from cloudckpt.backends.load.reader import StorageReader
from cloudckpt.backends.save.save_lease import SaveLease
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.system.system_limits import in_thread
from cloudckpt.backends.transfer.task_pool import start_task
from cloudckpt.run import Run

_LAST_SECONDS: Final = 60.0
"""Seconds that the deletion of leases may take at the end; later they expire."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that is being opened."""

    lease: Future[SaveLease | None]
    metadata: Future[bytes]


class ReadAhead:
    """Opens steps of a run on the rank that reads their metadata for all.

    Args:
        run: the run.
        rank: of this process, for people who look at a lease.
        trust: as of a `StorageReader`.
    """

    def __init__(self, run: Run, rank: Callable[[], int], trust: bool) -> None:
        self._run = run
        self._rank = rank
        self._trust = trust
        self._steps: dict[int, _Step] = {}
        self._newer: Future[list[int]] | None = None
        self._ending: list[Future[None]] = []

    def choose(self, step: int | None, last: int | None) -> int | None:
        """Return the step to load, by default the newest that is committed; None where none is.

        Args:
            step: the step that was asked for.
            last: the step that this process saved or loaded last, if any.

        Raises:
            ConfigurationError: no step has this number.
            StorageError: the store could not be read.
        """
        if step is not None:
            number = self._run.number(step)
            self._newer = start_task(partial(self._run.newer, number), concurrent=self._is_remote)
            if self._is_remote:
                self._open(number)
            return number
        self._newer = None
        if not self._is_remote:
            return self._run.newest()
        if last is not None:
            self._open(last)
        for folder in reversed(self._run.folders()):
            try:
                self.metadata(folder)
            except CheckpointNotFoundError:  # started, or deleted since the listing
                self._drop(folder)
            except IntegrityError:  # committed, and too large: its load says so
                return folder
            else:
                return folder
        return None

    def is_newest(self) -> bool:
        """Return True if no step above the chosen one is committed.

        Raises:
            StorageError: the store could not be read.
        """
        return self._newer is None or not self._newer.result()

    def metadata(self, step: int) -> bytes:
        """Return the ``.metadata`` of a step, on which this process holds a lease if it may put one.

        Raises:
            CheckpointNotFoundError: the step is not committed.
            StorageError: the store could not be read.
        """
        opened = self._open(step)
        wait([opened.lease])
        return opened.metadata.result()

    def release(self) -> None:
        """End all leases. With a remote store this does not wait for it."""
        for step in list(self._steps):
            self._drop(step)

    def close(self) -> None:
        """End all leases, and wait until they are deleted."""
        self.release()
        wait(self._ending, _LAST_SECONDS)
        self._ending.clear()

    @cached_property
    def _is_remote(self) -> bool:
        return open_store(self._run.target).is_remote

    def _open(self, step: int) -> _Step:
        """Begin to put a lease on a step and to read its metadata, if that was not started.

        The two are in flight together. A step that is deleted between them has no metadata any more by the
        time of the lease, and may lack objects: a load that then fails says that the step was deleted.
        """
        if step not in self._steps:
            remote, target = self._is_remote, self._run.at(step)
            lease = start_task(partial(put_lease, target, self._rank()), concurrent=remote)
            try:
                fetch = StorageReader(target, trust=self._trust).fetch_metadata
                self._steps[step] = _Step(lease, start_task(fetch, concurrent=remote))
            except BaseException:
                _end(lease)
                raise
        return self._steps[step]

    def _drop(self, step: int) -> None:
        opened = self._steps.pop(step)
        self._ending = [one for one in self._ending if not one.done()]
        end = partial(_end, opened.lease)
        if self._is_remote:  # a process that exits right away waits for it, or its lease would have to expire
            self._ending.append(in_thread(end, "cloudckpt-lease", daemon=False))
        else:
            end()


def _end(lease: Future[SaveLease | None]) -> None:
    if lease.exception() is None and (held := lease.result()) is not None:
        held.end()
