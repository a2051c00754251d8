"""The reason why a rank is absent, sent through the connection that training opened before.

A firewall may let established connections through and refuse new ones. Without the reason, the other ranks
would only see that the rank does not join.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from torch.distributed import Store

from cloudckpt.backends.system.system_limits import try_for
from cloudckpt.backends.torch_private import default_store
from cloudckpt.executor import forks

_PATIENCE: Final = 3.0
"""Seconds for the store: training may be waiting on the same connection, or the network may be gone."""
_reported: Final[set[tuple[str, int]]] = set()


def training_store() -> Store | None:
    """Return the store of training's default group; None without a group.

    Its prefixes are part of it: a launcher that restarts a job may keep the store, and changes a prefix.
    """
    if not forks.has_own_group():
        return None
    return default_store()


def report(group: str, rank: int, reason: str) -> None:
    """Report to the other ranks of a group why this one is absent, if training's connection still works."""
    store = training_store()
    if store is not None:
        _reported.add((group, rank))
        _bounded(lambda: store.set(_key(group, rank), reason))


def withdraw(group: str, rank: int) -> None:
    """Delete the reason, once the rank is back."""
    store = training_store()
    if store is not None and (group, rank) in _reported:
        _reported.discard((group, rank))
        _bounded(lambda: store.delete_key(_key(group, rank)))


def reasons(group: str, ranks: Iterable[int]) -> dict[int, str]:
    """Return the reasons that absent ranks have reported."""
    store, found = training_store(), dict[int, str]()

    def read() -> None:
        for rank in ranks:
            if store is not None and store.check([_key(group, rank)]):
                found[rank] = store.get(_key(group, rank)).decode()

    _bounded(read)
    return dict(found)


def _bounded(run: Callable[[], object]) -> None:
    def quietly() -> None:
        try:
            run()
        except RuntimeError:  # any error of a store: the report is lost
            return

    try_for(_PATIENCE, quietly, "cloudckpt-absence")  # without a thread, the others find out by themselves


def _key(group: str, rank: int) -> str:
    return f"cloudckpt/{group}/absent/{rank}"
