"""Collectives that ranks make in processes of their own, for what each of them gets."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.utils import _DistWrapper

from cloudckpt.executor.network import store_group

RANKS = 3
BIG = 9_000_000
"""Bytes: more than a store takes as one value."""


def objects(rank: int) -> Any:
    every: list[Any] = [None] * RANKS
    dist.all_gather_object(every, {"rank": rank, "data": b"x" * (rank * BIG)})
    first = [{"data": b"y" * BIG}] if rank == 1 else [None]
    dist.broadcast_object_list(first, src=1)
    gathered: list[Any] | None = [None] * RANKS if rank == 0 else None
    dist.gather_object((rank, "z" * rank), gathered, dst=0)
    own: list[Any] = [None]
    dist.scatter_object_list(own, [f"for {to}" * to for to in range(RANKS)] if rank == 2 else None, src=2)
    return every, first, gathered, own


def tensors(rank: int) -> Any:
    found = []
    for dtype in (torch.float32, torch.int64, torch.bfloat16, torch.uint8):
        for operation in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT):
            tensor = torch.arange(1, 7, dtype=dtype).reshape(2, 3).t() + rank
            dist.all_reduce(tensor, op=operation)
            found.append(tensor.tolist())
    every = [torch.empty(2, 0) for _ in range(RANKS)]
    dist.all_gather(every, torch.empty(2, 0))
    scalar = torch.tensor(float(rank))
    dist.broadcast(scalar, src=2)
    return found, [one.shape for one in every], scalar.item()


def dcp(rank: int) -> Any:
    ranks = _DistWrapper(None, use_dist=True, coordinator_rank=0)
    doubled = ranks.reduce_scatter("double", lambda: rank, lambda every: [2 * one for one in every])
    total = ranks.all_reduce("sum", lambda: rank, lambda every: sum(every))  # noqa: PLW0108 - for mypy
    try:
        ranks.all_gather("divide", lambda: 1 // (rank - 1))
    except CheckpointException as error:
        return doubled, total, {at: type(failure).__name__ for at, (failure, _) in error.failures.items()}
    raise AssertionError


def many(rank: int) -> Any:
    for number in range(50):
        every: list[Any] = [None] * RANKS
        dist.all_gather_object(every, (number, rank))
        assert every == [(number, one) for one in range(RANKS)]
        dist.barrier()
    second = dist.new_group([0, 2])
    if rank != 1:
        pair: list[Any] = [None, None]
        dist.all_gather_object(pair, rank, group=second)
        return pair
    return None


def spawned(work: Callable[[int], Any], backend: str) -> tuple[dict[int, Any], dist.TCPStore]:
    """Run ranks in processes of their own; what each rank's work returns, and the store that they had."""
    spawn = multiprocessing.get_context("spawn")
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = spawn.Queue()
    ranks = [
        spawn.Process(target=run, args=(work, backend, rank, server.port, results)) for rank in range(RANKS)
    ]
    for one in ranks:
        one.start()
    found = dict(results.get(timeout=120) for _ in ranks)
    for one in ranks:
        one.join(60)
        assert one.exitcode == 0
    return found, server


def run(work: Callable[[int], Any], backend: str, rank: int, port: int, results: Any) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    if backend == "gloo":
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    else:
        store_group.become_default(store, rank, RANKS, timeout=60)
        assert dist.get_backend() == store_group.BACKEND
    results.put((rank, work(rank)))
    dist.barrier()
    dist.destroy_process_group()
