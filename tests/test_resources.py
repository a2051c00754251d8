"""What a Checkpointer holds: nothing for reading, and nothing more after fifty saves than after a few."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch

import cloudckpt

FEW = 5
WARM = {"weights": torch.ones(1 << 16)}

READS = """
import signal, sys, threading
import cloudckpt, psutil, torch
checkpointer = cloudckpt.Checkpointer(sys.argv[1], progress=False)
before = {thread.name for thread in threading.enumerate()}
state = {"weights": torch.zeros(1 << 16)}
assert checkpointer.latest_step() == checkpointer.load(state) == 1
assert checkpointer.all_steps() == [1]
checkpointer.pin(1), checkpointer.unpin(1), checkpointer.wait()
assert psutil.Process().children(recursive=True) == []
assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
assert signal.set_wakeup_fd(-1) == -1
started = {thread.name for thread in threading.enumerate()} - before
assert not {name for name in started if name.startswith("cloudckpt")}, started
checkpointer.close()
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
print("read")
"""


def test_reading_starts_no_process_and_no_thread_and_handles_no_signal(tmp_path: Path) -> None:
    with cloudckpt.Checkpointer(tmp_path / "run", progress=False, preemption_grace=None) as checkpointer:
        checkpointer.save(1, WARM)
    ran = subprocess.run(
        [sys.executable, "-c", READS, str(tmp_path / "run")],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (0, "read\n"), ran.stderr


def test_signals_are_handled_from_the_first_call_that_saves(tmp_path: Path) -> None:
    begins: tuple[Callable[[cloudckpt.Checkpointer], object], ...] = (
        lambda one: one.warmup(),
        lambda one: one.save(1, WARM),
        lambda one: one.async_save(2, WARM),
    )
    for begin in begins:
        with cloudckpt.Checkpointer(tmp_path / "run", progress=False) as checkpointer:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            begin(checkpointer)
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_checkpointer_of_another_thread_saves(tmp_path: Path) -> None:
    saved: list[int] = []

    def work() -> None:
        with cloudckpt.Checkpointer(tmp_path / "run", progress=False) as checkpointer:
            saved.append(checkpointer.save(1, WARM).step)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            saved.append(checkpointer.load({"weights": torch.zeros(1 << 16)}))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert saved == [1, 1]


def held(pid: int) -> tuple[int, int, int]:
    """Return the open descriptors, threads and resident bytes of a process."""
    process = psutil.Process(pid)
    return len([*Path(f"/proc/{pid}/fd").iterdir()]), process.num_threads(), process.memory_info().rss


def synchronous(checkpointer: cloudckpt.Checkpointer, step: int) -> weakref.ref[Any]:
    made: list[weakref.ref[Any]] = []
    add = checkpointer._saves.add

    def noted(number: int, handle: Any) -> None:
        made.append(weakref.ref(handle))
        add(number, handle)

    with mock.patch.object(checkpointer._saves, "add", noted):
        checkpointer.save(step, WARM)
    return made[0]


def dropped(checkpointer: cloudckpt.Checkpointer, step: int) -> weakref.ref[Any]:
    return weakref.ref(checkpointer.async_save(step, WARM))


@pytest.mark.parametrize("save", [synchronous, dropped])
@pytest.mark.parametrize("more", [20, pytest.param(50, marks=pytest.mark.soak)])
def test_saves_in_a_loop_keep_nothing(
    tmp_path: Path, save: Callable[[cloudckpt.Checkpointer, int], weakref.ref[Any]], more: int
) -> None:
    with cloudckpt.Checkpointer(
        tmp_path / "run", progress=False, preemption_grace=None, keep_last=2
    ) as checkpointer:
        handles = [save(checkpointer, step) for step in range(FEW)]
        checkpointer.wait()
        process = checkpointer._executor.pid
        assert process is not None
        before = held(os.getpid()), held(process)
        handles += [save(checkpointer, step) for step in range(FEW, FEW + more)]
        checkpointer.wait()
        after = held(os.getpid()), held(process)
        gc.collect()
        assert sum(handle() is not None for handle in handles) <= 1
        assert checkpointer._executor.pid == process
    for (files, threads, size), (its_files, its_threads, its_size) in zip(before, after, strict=True):
        assert its_files <= files
        assert its_threads <= threads + 1
        assert its_size <= size + (24 << 20)
