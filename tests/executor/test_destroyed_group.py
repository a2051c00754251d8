"""A Checkpointer outlives the process group of its ranks, and may be made before it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.trainers import of_rank


def said_by_ranks(folder: Path, world_size: int) -> list[dict[str, Any]]:
    """Run `support.leaver` on so many ranks, and return what each said."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "support.leaver", f"file://{folder}/run"]
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=of_rank(rank, world_size, "127.0.0.1", port),
                )
            )
            for rank in range(world_size)
        ]
        ended = [rank.communicate(timeout=120) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * world_size, ended
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


def test_two_ranks_wait_for_saves_and_close_after_destroy_process_group(tmp_path: Path) -> None:
    for rank, said in enumerate(said_by_ranks(tmp_path, 2)):
        assert said["steps"] == [1, 2]
        assert (said["before"], said["loaded"]) == (None, 2)
        assert said["shows"] == (rank == 0)
        assert "the save of step 3 of" in said["refused"]
        assert "came after destroy_process_group()" in said["refused"]
        assert "make a new Checkpointer" in said["refused"]


@pytest.mark.soak
def test_one_rank_goes_on_as_a_single_process_after_destroy_process_group(tmp_path: Path) -> None:
    (said,) = said_by_ranks(tmp_path, 1)
    assert (said["steps"], said["saved"], said["loaded"]) == ([1, 2], 3, 3)
