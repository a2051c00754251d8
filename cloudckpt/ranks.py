"""Answers that all ranks of a job must share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from cloudckpt.backends.errors import CheckpointError
from cloudckpt.executor.rendezvous import grouped

T = TypeVar("T")


def own_rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank in the group; 0 in a single process."""
    return dist.get_rank(group) if grouped() else 0


def agreed(ask: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Ask on the group's first rank, and return its answer, or raise its error, on every one.

    A collective: every rank calls it. Without ``torch.distributed`` it asks here.
    """
    if not grouped():
        return ask()
    box: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            box[0] = ask()
        except CheckpointError as error:
            box[1] = error
    dist.broadcast_object_list(box, group=group, group_src=0)
    if box[1] is not None:
        raise box[1]
    return cast("T", box[0])
