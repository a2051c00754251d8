"""The end of a job whose ranks close one after another: nothing is printed that looks like a crash."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.trainers import of_rank


@pytest.mark.parametrize("own_store", [False, True])
def test_a_clean_close_prints_nothing_of_a_server_that_crashed(tmp_path: Path, *, own_store: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(rank_of_job(rank, port, tmp_path, own_store=own_store)) for rank in (0, 1)
        ]
        for rank in ranks:
            out, errors = rank.communicate(timeout=120)
            assert json.loads(out.splitlines()[-1])["errors"] == []
            assert "Did the remote server" not in errors


def rank_of_job(rank: int, port: int, folder: Path, *, own_store: bool) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "support.host_job", f"file://{folder}/run", "{}", "60"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=of_rank(
            rank,
            2,
            "127.0.0.1",
            port,
            TORCH_CPP_LOG_LEVEL="WARNING",
            **({"DCP_USE_PREFIX_STORE": "0"} if own_store else {}),
        ),
    )
