"""Own descriptors stay clear of the standard ones, and a stream that would block is known by asking."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from cloudckpt.backends.system.descriptors import takes

PROGRAM = """
import os, sys
from cloudckpt.backends.system import descriptors
from cloudckpt.executor import process_monitor, progress
from cloudckpt.executor.snapshot import arena
told = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.dup2(told, 100)
os.close(told)
os.close(0); os.close(1); os.close(2)
made = [*descriptors.pipe(), descriptors.opened(sys.argv[1], os.O_RDONLY), descriptors.unix_socket().detach()]
made += [one.detach() for one in descriptors.socket_pair()]
made += [arena.new_descriptor(), process_monitor.Alarm().fileno(), progress.ProgressBoard().fd]
descriptors.fill_standard()
filled = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
os.write(100, repr((min(made), filled, os.get_inheritable(1), os.get_inheritable(made[0]))).encode())
"""


def test_every_descriptor_of_our_own_is_three_or_higher(tmp_path: Path) -> None:
    told = tmp_path / "told"
    subprocess.run([sys.executable, "-c", PROGRAM, str(told)], check=True, timeout=100)
    lowest, filled, standard, own = eval(told.read_text())  # noqa: S307 - written by the program above
    assert lowest >= 3
    assert filled == [os.devnull] * 3
    assert standard and not own


def test_bytes_are_taken_by_files_and_by_pipes_with_room(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    assert takes(write, 4096) and takes(write, 1 << 20)  # an empty one: more can't be asked for
    os.write(write, b"x")
    assert takes(write, 4096) and not takes(write, 1 << 20)
    with contextlib.suppress(BlockingIOError):
        while os.write(write, b"x" * 4096):
            pass
    assert not takes(write, 1)
    with (tmp_path / "file").open("wb") as file:
        assert takes(file.fileno(), 1 << 30)
    assert takes(10_000, 1)
    os.close(read)
    os.close(write)


LOW = (
    "os.open(",
    "os.pipe(",
    "memfd_create(",
    "socketpair(",
    "pidfd_open(",
    "os.dup(",
    "socket.socket(socket.AF_UNIX",
)


def test_only_one_module_makes_descriptors_by_itself() -> None:
    root = Path(__file__).parents[1]
    found = {
        f"{folder}/{path.name}: {line.strip()}"
        for folder in ("cloudckpt", "executor", "backends")
        for path in (root / folder).rglob("*.py")
        if path.name != "descriptors.py"
        for line in path.read_text().splitlines()
        if any(call in line for call in LOW) and "kept_clear(" not in line
    }
    assert not found


def test_every_thread_of_a_save_is_started_where_its_failure_is_named() -> None:
    root = Path(__file__).parents[1]
    pools = [
        str(path)
        for folder in ("cloudckpt", "executor", "backends")
        for path in (root / folder).rglob("*.py")
        if path.name != "system_limits.py" and "ThreadPoolExecutor(" in path.read_text()
    ]
    assert not pools
