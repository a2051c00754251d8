"""Saving, loading and verifying hold at most `memory_limit` beyond the tensors themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.servers import S3Server, rclone_server

PROGRAM = Path(__file__).parent / "support" / "peak.py"
LIMIT = 64 << 20
# What threads, connections and the allocator take beside what the library counts. A second copy of one
# tensor of the state would be more.
SLACK = 24 << 20


def peaks(uri: str, gib: float, environment: dict[str, str] | None = None) -> list[int]:
    """Peak growth in bytes of a save, a load and verify of so many GiB, in a process of its own."""
    command = [sys.executable, str(PROGRAM), uri, str(gib), str(LIMIT)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    grown = [int(number) for number in ran.stdout.split()]
    assert len(grown) == 3
    return grown


@pytest.mark.soak
def test_two_gib_to_and_from_a_folder(tmp_path: Path) -> None:
    assert max(peaks(f"file://{tmp_path}/ckpt", 2)) <= LIMIT + SLACK


@pytest.fixture
def folder_server(tmp_path: Path) -> Iterator[S3Server]:
    """An S3 server that keeps objects in a folder, so that it needs no memory for them."""
    with rclone_server(tmp_path) as server:
        yield server


def test_half_a_gib_to_and_from_an_s3_server(folder_server: S3Server) -> None:
    uri = f"s3://{folder_server.new_bucket()}/ckpt"
    assert max(peaks(uri, 0.5, {**os.environ, **folder_server.environment})) <= LIMIT + SLACK
