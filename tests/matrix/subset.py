"""Choose the tests that run on each pair, and run them."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Final

from matrix import floors
from matrix.environment import BrokenError, Environment

TESTS: Final = (
    # What moves between releases of torch: private names, DCP's metadata, planner, storage and executors.
    "tests/test_torch_private.py",
    "tests/test_metadata.py",
    "tests/test_framing.py",
    "tests/test_writer.py",
    "tests/test_reader.py",
    "tests/state/test_tensors.py",
    "tests/state/test_values.py",
    "tests/state/test_containers.py",
    "tests/executor/test_snapshot.py",
    "tests/executor/test_process_executor.py",
    # What moves with Python and with the other requirements.
    "tests/test_front_door.py",
    "tests/test_options.py",
    "tests/test_background_log.py",
    "tests/test_run.py",
    "tests/cli/test_show.py",
    # A run of two ranks, with Checkpointer.
    "tests/test_checkpointer.py::test_two_ranks_save_and_load_what_they_share_and_always_agree",
    # Bit for bit against the stock reader and writer, in a folder and on moto.
    "tests/test_interop.py",
)
# Servers that are not installed there, the longest forms, and torch 2.9's own writer on gcsfs.
_LEFT_OUT: Final = (
    "not ministack and not rclone and not juicefs and not two_thousand and not [3- and not (stock and gcs)"
)


def run(environment: Environment) -> None:
    """Run the subset with pytest on two workers; raise BrokenError if a test fails or time runs out."""
    doing = f"run the tests on {environment.pair.name}"
    pytest = environment.folder / "bin" / "pytest"
    command = [
        str(pytest),
        "-q",
        "-n",
        "2",
        "--dist",
        "loadscope",
        "--max-worker-restart=0",
        "-k",
        _LEFT_OUT,
        *TESTS,
    ]
    started = time.monotonic()
    # A clean environment of pytest's own: PYTHONPATH of this tool would hide what is installed.
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(command, cwd=floors.ROOT, env=settings)
    try:
        code = process.wait(environment.deadline.left(doing))
    except (subprocess.TimeoutExpired, BrokenError):
        process.terminate()
        process.wait()
        environment.deadline.left(doing)
        raise
    if code:
        raise BrokenError(f"pytest ended with {code} after {time.monotonic() - started:.0f} s: see above")
