"""What ranks send each other in collectives, one of them hostile: it sends pickles, as torch's own would."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt import rank_broadcast
from cloudckpt.backends.errors import CheckpointError
from cloudckpt.executor.coordination import collectives
from cloudckpt.executor.worker.rank_conflicts import RankCheck, Summary
from cloudckpt.executor.worker.worker import Worker
from support.collectives import RANKS

DATA = (b"", b"\x80\x04" * 3_000_000, b"\xff\x00")
CANARY = "CLOUDCKPT_TEST_CANARY"


class Canary:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path(os.environ[CANARY]),)


def honest(rank: int) -> Any:
    every = collectives.all_gather(DATA[rank])
    gathered = collectives.gather(DATA[rank])
    first = collectives.broadcast(DATA[0] if rank == 0 else None)
    own = collectives.scatter(list(reversed(DATA)) if rank == 0 else None)
    return every, gathered, first, own


def hostile(rank: int) -> Any:
    """Return by name of an exchange what it raised on this rank. The last rank sends a pickle in each."""
    exchanges = (answers, gathered, errors, reports, digests)
    return {exchange.__name__: _said(exchange, rank) for exchange in exchanges}


def _said(exchange: Callable[[int], object], rank: int) -> str | None:
    try:
        return exchange(rank)  # type: ignore[return-value]
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    except CheckpointException as error:
        ((failure, _),) = error.failures.values()
        return f"{type(failure).__name__}: {failure}"


def answers(rank: int) -> None:
    """Ask the first rank of a group, which is the hostile one."""
    group: Any = dist.new_group([RANKS - 1, 0, 1], sort_ranks=False)
    if rank == RANKS - 1:
        dist.broadcast_object_list([Canary()], group=group, group_src=0)
    else:
        rank_broadcast.agreed(lambda: 1, group)


def gathered(rank: int) -> None:
    """Give the first rank values of all."""
    if rank == RANKS - 1:
        dist.gather_object(Canary(), None, dst=0)
    else:
        rank_broadcast.gathered(["name"], None)


def errors(rank: int) -> None:
    """Give the first rank errors of all, and get what all raise."""
    if rank == RANKS - 1:
        dist.gather_object(Canary(), None, dst=0)
        collectives.broadcast(None)
    else:
        rank_broadcast.together(lambda: None, lambda: None, None)


def reports(rank: int) -> None:
    """Exchange what checkpoint processes say to each other before a save."""
    if rank == RANKS - 1:
        collectives.all_gather(pickle.dumps(Canary()))
    else:
        worker: Any = Worker.__new__(Worker)
        worker._hello = SimpleNamespace(place="a group")
        worker._check = None
        worker._together(ValueError("this rank's own"), None)


def digests(rank: int) -> None:
    """Compare the digests of all ranks on the first, which answers all of them."""
    if rank == RANKS - 1:
        dist.gather_object(Canary(), None, dst=0)
        collectives.scatter(None)
    else:
        RankCheck(rank, RANKS).settle([Summary(one, one, None) for one in range(RANKS)], {}, "error")
