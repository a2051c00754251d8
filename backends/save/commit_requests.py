"""The requests of a coordinator around its uploads: looks and a marker before them, the marker after them.

Requests that do not depend on each other are in flight together where each takes a round trip. Other stores
get them one after another, on the caller's thread, and so does a server that was not probed yet.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, Final

from cloudckpt.backends.save.save_lease import SaveLease
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.transfer.task_pool import start_task

_FRESH: Final = 5.0
"""Seconds for which a look at the marker is good for a commit; gc takes a save for dead after minutes."""


@dataclass(frozen=True, slots=True)
class _Clocks:
    """Two clocks: one does not count a suspension of the machine, and the other one can be set."""

    monotonic: float = field(default_factory=time.monotonic)
    wall: float = field(default_factory=time.time)

    def is_fresh(self) -> bool:
        return time.monotonic() - self.monotonic <= _FRESH and 0 <= time.time() - self.wall <= _FRESH


class Coordinator:
    """The requests that a save makes on its coordinator alone.

    Args:
        store: the checkpoint's.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._concurrent = store.is_remote and store.is_probed
        self._looks: list[Future[None]] = []
        self._marking: Future[SaveLease] | None = None
        self._check: tuple[_Clocks, Future[None]] | None = None

    def look(self, look: Callable[[], None]) -> None:
        """Begin a look that may refuse the save.

        Raises:
            CheckpointError: the save is refused. With a remote store, `settle` raises it.
        """
        self._looks.append(start_task(look, concurrent=self._concurrent))

    def mark(self, save_id: str, rank: int) -> None:
        """Begin to put the marker of the save.

        Raises:
            StorageError: the store could not be written to. With a remote store, `settle` raises it.
        """
        put = functools.partial(SaveLease, self._store, save_id, rank)
        self._marking = start_task(put, concurrent=self._concurrent)

    def settle(self) -> None:
        """Wait for all that was started. No byte of the state is sent before.

        Raises:
            CheckpointError: the save is refused, or its marker could not be put.
        """
        requests: list[Future[Any]] = [*self._looks]
        if self._marking is not None:
            requests.append(self._marking)
        wait(requests)
        for request in requests:
            request.result()

    def begin_check(self) -> None:
        """Begin to look for the marker, while uploads are completed."""
        marker = self._marker()
        if marker is not None and self._concurrent:
            self._check = _Clocks(), start_task(marker.check, concurrent=True)

    def check(self) -> None:
        """Make sure right before the commit that the marker is there.

        Raises:
            CommitError: the marker is gone, and parts of the save may be.
            StorageError: the store did not say.
        """
        check, self._check = self._check, None
        if check is not None:
            at, found = check
            found.result()
            if at.is_fresh():
                return
        if (marker := self._marker()) is not None:
            marker.check()

    def conclude(self, ensure_whole: Callable[[], None], remove_previous: Callable[[], None] | None) -> None:
        """Do what follows the commit: look whether it is whole, remove what it replaced, delete the marker.

        Args:
            ensure_whole: takes the commit back and raises an error if an object is gone.
            remove_previous: deletes what was replaced; None where nothing was.

        Raises:
            CheckpointError: of ``ensure_whole``.
        """
        if not self._concurrent:
            marker = self._marker()
            if marker is not None and marker.is_gone():
                ensure_whole()
            if remove_previous is not None:
                remove_previous()
            self.end()
        elif remove_previous is None:
            # The objects tell as much as the marker does, and can be looked at while it is deleted.
            ending = start_task(self.end, concurrent=True)
            try:
                ensure_whole()
            finally:
                wait([ending])
        else:
            ensure_whole()  # first: taking the commit back needs what was replaced
            removing = start_task(remove_previous, concurrent=True)
            self.end()
            removing.result()

    def end(self) -> None:
        """Delete the marker, also one that is being put."""
        marking, self._marking = self._marking, None
        if marking is not None and marking.exception() is None:  # which waits for it
            marking.result().end()

    def leave(self) -> None:
        """Renew the marker no more, and leave it where it is."""
        if (marker := self._marker()) is not None:
            marker.leave()
        self._marking = None

    def _marker(self) -> SaveLease | None:
        """Return the marker if it was put."""
        if self._marking is None or not self._marking.done() or self._marking.exception() is not None:
            return None
        return self._marking.result()
