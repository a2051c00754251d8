"""Checkpointers that a rank of a pool keeps from call to call.

They are kept here because a test's own module travels to the ranks anew with each call.
"""

from __future__ import annotations

from typing import Any

from cloudckpt import Checkpointer

_LIVING: dict[tuple[str, str], Checkpointer] = {}


def living(uri: str, **options: Any) -> Checkpointer:
    """Return this rank's Checkpointer of a run and of these options, made at the first call."""
    key = uri, repr(sorted(options.items()))
    if key not in _LIVING:
        _LIVING[key] = Checkpointer(uri, preemption_grace=None, progress=False, **options)
    return _LIVING[key]


def end(_rank: int) -> None:
    """Close this rank's Checkpointers."""
    while _LIVING:
        _LIVING.popitem()[1].close()
