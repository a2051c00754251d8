"""Collectives over a store do what gloo's do, to the byte, and leave nothing in the store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cloudckpt.executor.network import store_group
from support.collectives import RANKS, dcp, many, objects, spawned, tensors


@pytest.mark.parametrize("work", [objects, tensors, dcp, many])
def test_collectives_over_a_store_do_what_those_of_gloo_do(work: Callable[[int], Any]) -> None:
    found = []
    for backend in ("gloo", store_group.BACKEND):
        results, server = spawned(work, backend)
        found.append(results)
        if backend == store_group.BACKEND:
            assert server.num_keys() <= 2 * RANKS, "values of collectives are left in the store"
    assert found[0] == found[1]
