"""Executors that live in a rank's process from call to call, and saves that are compared."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt.executor import ProcessExecutor

_LIVING: dict[str, ProcessExecutor] = {}


def living(name: str, **options: Any) -> ProcessExecutor:
    """The executor of this name in this process, made at the first call."""
    if name not in _LIVING:
        _LIVING[name] = ProcessExecutor(**options)
    return _LIVING[name]


def end(name: str) -> None:
    """Close an executor that `living` made."""
    if name in _LIVING:
        _LIVING.pop(name).close()


def small_state(step: int, rank: int = 0) -> dict[str, Any]:
    """A state that differs from step to step and from rank to rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {
        f"shard_{rank}": torch.randn(300, 50, generator=generator),
        "shared": torch.full((40,), float(step)),
        "nested": {"values": [step, f"step {step}"], "half": torch.ones(7, dtype=torch.bfloat16) * step},
    }


def assert_loads(uri: str, expected: dict[str, Any], **options: Any) -> None:
    """Load what was saved into a state of zeros, and compare it bit for bit."""
    loaded: dict[str, Any] = {
        key: torch.zeros_like(value) if isinstance(value, torch.Tensor) else value
        for key, value in expected.items()
    }
    half = expected["nested"]["half"]
    loaded["nested"] = {"values": [0, ""], "half": torch.zeros_like(half)}
    dcp.load(loaded, storage_reader=cloudckpt.StorageReader(uri, **options), no_dist=True)
    nested: dict[str, Any] = loaded["nested"]
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(loaded[key], value), key
    assert nested["values"] == expected["nested"]["values"]
    assert torch.equal(nested["half"], half)


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.01)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail when the block takes longer: a bound on waiting, generous enough for a busy machine."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < seconds, f"took {took:.1f} s"
