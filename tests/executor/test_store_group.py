"""Collectives over a store do what gloo's do, to the byte, and leave nothing in the store."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from cloudckpt.executor.network import store_group
from support.collectives import RANKS, dcp, many, objects, run, tensors


@pytest.mark.parametrize("work", [objects, tensors, dcp, many])
def test_collectives_over_a_store_do_what_those_of_gloo_do(work: Callable[[int], Any]) -> None:
    spawn = multiprocessing.get_context("spawn")
    found = []
    for backend in ("gloo", store_group.BACKEND):
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        results = spawn.Queue()
        ranks = [
            spawn.Process(target=run, args=(work, backend, rank, server.port, results))
            for rank in range(RANKS)
        ]
        for one in ranks:
            one.start()
        found.append(dict(results.get(timeout=120) for _ in ranks))
        for one in ranks:
            one.join(60)
            assert one.exitcode == 0
        if backend == store_group.BACKEND:
            assert server.num_keys() <= 2 * RANKS, "values of collectives are left in the store"
    assert found[0] == found[1]
