"""Systems other than Linux: macOS as far as it can be simulated here, and Windows, which is refused.

macOS is simulated by what a program can see: the name of the platform, and the functions, constants and files
that only Linux has (`support/platforms`). gloo, the kernel and the file system stay those of Linux.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

LIKE_MACOS = Path(__file__).parent / "support" / "platforms"


def ran(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, **environment},
    )


def test_windows_gets_one_clear_error() -> None:
    failed = ran("import sys; sys.platform = 'win32'; import cloudckpt")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == (
        "ImportError: cloudckpt needs Linux or macOS, and this is Windows: "
        "run it in the Windows Subsystem for Linux (WSL 2)"
    )


def test_without_what_only_linux_has_a_folder_is_saved_to_and_loaded_from(tmp_path: Path) -> None:
    """In the trainer by StorageWriter, and in a process of its own by Checkpointer."""
    done = ran(
        """
        import os, sys, warnings
        warnings.simplefilter("ignore")
        assert sys.platform == "darwin" and not hasattr(os, "memfd_create")
        import torch, torch.distributed.checkpoint as dcp
        import cloudckpt, cloudckpt.executor, cloudckpt.doctor, cloudckpt.bench, cloudckpt.cli

        folder = os.environ["FOLDER"]
        state = {"a": torch.arange(1 << 20)}
        dcp.save(state, storage_writer=cloudckpt.StorageWriter(f"{folder}/one"))
        again = {"a": torch.zeros_like(state["a"])}
        dcp.load(again, storage_reader=cloudckpt.StorageReader(f"{folder}/one"))
        assert torch.equal(again["a"], state["a"])
        assert not cloudckpt.verify(f"{folder}/one").damages

        with cloudckpt.Checkpointer(f"file://{folder}/run", keep_last=1) as run:
            run.warmup()
            for step in (1, 2):
                handle = run.async_save(step, state)
                handle.staged.result(60)
            assert handle.result(60).step == 2
            assert run.all_steps() == [2]
            again = {"a": torch.zeros_like(state["a"])}
            assert run.load(again) == 2 and torch.equal(again["a"], state["a"])
        print("saved")
        """,
        PYTHONPATH=str(LIKE_MACOS),
        FOLDER=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "saved"
