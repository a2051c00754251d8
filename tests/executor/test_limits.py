"""Saving in the background needs no descriptor for each tensor and no room in ``/dev/shm``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from support.mounts import SHM_MIB, SMALL_SHM, private_mounts

TENSORS = 10_000
DESCRIPTORS = 256

MANY = f"""
import resource, sys
import torch
import cloudckpt
from cloudckpt.executor import ProcessExecutor
resource.setrlimit(resource.RLIMIT_NOFILE, ({DESCRIPTORS}, {DESCRIPTORS}))
state = {{f"t{{i}}": torch.full((12,), i) for i in range({TENSORS})}}
with ProcessExecutor() as executor:
    writer = cloudckpt.StorageWriter(sys.argv[1])
    executor.execute_save(state, storage_writer=writer).result(timeout=100)
"""

LARGE = f"""
import os, sys
import torch
import cloudckpt
from cloudckpt.executor import ProcessExecutor
from cloudckpt.executor.snapshot import arena
room = os.statvfs("/dev/shm")
assert room.f_blocks * room.f_frsize == {SHM_MIB} << 20, room
state = {{f"t{{i}}": torch.full((12 << 20,), float(i)) for i in range(3)}}
with ProcessExecutor() as executor:
    writer = cloudckpt.StorageWriter(sys.argv[1])
    executor.execute_save(state, storage_writer=writer).result(timeout=100)
# Without a memfd there is no more than that, which is an error and no bus error.
arena._GROWS_IN_PLACE, arena.memory_file = False, lambda: None
small = arena.Arena()
small.reserve({SHM_MIB // 2} << 20)
try:
    small.reserve({SHM_MIB * 2} << 20)
except cloudckpt.ExecutorError as error:
    print(error)
"""


def run(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def load(uri: str, state: dict[str, torch.Tensor]) -> None:
    dcp.load(state, storage_reader=cloudckpt.StorageReader(uri))


def test_ten_thousand_tensors_are_saved_by_a_process_with_256_descriptors(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/many"
    run(sys.executable, "-c", MANY, uri)
    state = {f"t{i}": torch.zeros(12, dtype=torch.int64) for i in range(TENSORS)}
    load(uri, state)
    for i in range(TENSORS):
        assert state[f"t{i}"].eq(i).all(), i


def test_a_state_larger_than_shm_is_saved(tmp_path: Path) -> None:
    mounts = private_mounts()
    if mounts is None:
        pytest.skip("needs to mount a small /dev/shm, which this user may not")
    uri = f"file://{tmp_path}/large"
    said = run(*mounts, "sh", "-c", SMALL_SHM, "sh", sys.executable, "-c", LARGE, uri)
    assert "no room: No space left on device" in said
    state = {f"t{i}": torch.zeros(12 << 20) for i in range(3)}
    load(uri, state)
    for i in range(3):
        assert state[f"t{i}"].eq(i).all(), i
