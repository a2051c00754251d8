"""Collectives of bytes: each rank gets what was sent, and what a hostile rank sends is never unpickled."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch.distributed as dist

import cloudckpt
from cloudckpt import backends, executor
from cloudckpt.executor.network import store_group
from support import sent_bytes
from support.collectives import RANKS, spawned


@pytest.mark.parametrize("backend", ["gloo", store_group.BACKEND])
def test_each_rank_gets_the_bytes_that_were_sent(backend: str) -> None:
    for rank, (every, gathered, first, own) in spawned(sent_bytes.honest, backend)[0].items():
        assert every == [sent_bytes.DATA[one] for one in range(RANKS)]
        assert gathered == (every if rank == 0 else None)
        assert first == sent_bytes.DATA[0]
        assert own == sent_bytes.DATA[RANKS - 1 - rank]


def test_what_a_hostile_rank_sends_is_refused_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "ran"
    monkeypatch.setenv(sent_bytes.CANARY, str(canary))
    found, _ = spawned(sent_bytes.hostile, "gloo")
    foreign, unreadable = "ExecutorError: what rank", "CheckpointError: a failure could not be read here"
    for rank in (0, 1):
        for exchange, said in found[rank].items():
            if exchange == "gathered" and rank != 0:
                assert said is None
            else:
                assert (said or "").startswith(unreadable if exchange == "errors" else foreign), exchange
    assert not canary.exists()


def test_no_module_uses_torchs_collectives_of_objects() -> None:
    # `executor` and `backends` are links in a checkout.
    folders = [Path(package.__path__[0]).resolve() for package in (cloudckpt, backends, executor)]
    called = {
        node.attr
        for folder in folders
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    assert {"broadcast", "all_gather"} <= called
    assert not {name for name in called if name.endswith(("_object", "_object_list")) and name in dir(dist)}
