"""Values that the checkpoint processes of a job exchange through a store while they form their group."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from torch.distributed import DistError, Store

from cloudckpt.backends.errors import ExecutorError

_REASON: Final = "carrier"


def leave_last(store: Store, rank: int, world_size: int, timeout: float) -> None:
    """Have rank 0, with which the store may end, wait for the other ranks for at most ``timeout`` seconds.

    Every rank calls it when it no longer needs the store. A rank that waits on a store that ends has torch
    print that the server crashed.

    Raises:
        DistError: a rank leaves later, or the store is gone.
    """
    if store.add("left", 1) == world_size:
        store.set("all left", "1")
    if rank == 0:
        store.wait(["all left"], timedelta(seconds=timeout))


@dataclass(frozen=True, slots=True)
class Agreement:
    """One attempt of all ranks to form a group. Values are JSON.

    Args:
        store: prefixed for this attempt.
        rank: of this process.
        world_size: number of ranks.
        deadline: of the attempt, by `time.monotonic`.
    """

    store: Store
    rank: int
    world_size: int
    deadline: float

    @property
    def left(self) -> float:
        """Seconds until the deadline, some milliseconds at least."""
        return max(0.01, self.deadline - time.monotonic())

    def publish(self, name: str, value: object) -> None:
        """Store a value."""
        self.store.set(name, json.dumps(value))

    def read(self, name: str) -> Any:
        """Return a value, once another rank has stored it.

        Raises:
            ExecutorError: no rank has, before the deadline.
        """
        return self.read_all([name])[0]

    def read_all(self, names: Iterable[str]) -> list[Any]:
        """Return values in the order of their names, once other ranks have stored them all.

        Raises:
            ExecutorError: one is missing at the deadline.
        """
        wanted = list(names)
        try:
            self.store.wait(wanted, timedelta(seconds=self.left))
            return [json.loads(value) for value in self.store.multi_get(wanted)]
        except DistError as error:
            missing = ", ".join(name for name in wanted if not self._has(name)) or "the store"
            raise ExecutorError(
                f"the checkpoint process of rank {self.rank} waited for other ranks' in vain ({missing})",
                rank=self.rank,
                hint="Look at the other ranks' errors, or raise start_timeout if their hosts start processes "
                "slowly; the next save tries again",
            ) from error

    def is_decided(self) -> bool:
        """Return True once `decide` has an answer."""
        return self._has(_REASON)

    def decide(self, failure: str | None) -> str | None:
        """Return None if every rank succeeded; else the first failure, the same on every rank.

        Args:
            failure: of this rank; None for success.

        Raises:
            ExecutorError: a rank published nothing before the deadline.
        """
        if failure is not None:
            self.store.compare_set(_REASON, "", json.dumps(failure))
        elif self.store.add("succeeded", 1) == self.world_size:
            self.store.compare_set(_REASON, "", json.dumps(None))
        return self.reason()

    def reason(self) -> str | None:
        """Return what `decide` returned.

        Raises:
            ExecutorError: nothing was decided before the deadline.
        """
        reason: str | None = self.read(_REASON)
        return reason

    def _has(self, name: str) -> bool:
        try:
            return bool(self.store.check([name]))
        except DistError:
            return False
