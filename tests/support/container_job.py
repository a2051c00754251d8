"""A whole job, to be run in the environments that containers and schedulers make.

It saves, saves in the background, has its checkpoint process killed under a save, saves again and loads. What
became of it goes to a file: its standard streams may be closed, or pipes that nobody reads. No assert is
used, which -OO removes.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 90.0
MIB = 1 << 20
HUNGRY = f"""
with open("/proc/self/oom_score_adj", "w") as file:
    file.write("900")
taken = b"x" * {96 * MIB}
input()
"""


def main(settings: dict[str, Any]) -> list[str]:
    """Run the job and say what it did."""
    where = Path(settings["report"]).parent
    if settings.get("cwd") == "gone before the imports":
        leave_folder(where)
    import torch  # noqa: PLC0415 - the working directory is gone by now

    import cloudckpt  # noqa: PLC0415

    logging.basicConfig(level=logging.INFO)
    said: list[str] = []

    def state(value: float) -> dict[str, Any]:
        return {
            "w": torch.full((settings.get("mib", 1) * MIB // 4,), value),
            "gewicht-ü": torch.ones(3),
            "n": int(value),
        }

    def loaded(value: float, load: Callable[[dict[str, Any]], int], step: int) -> None:
        into = state(0.0)
        found = load(into)
        # Without a second one beside it, which the narrowest limit has no room for.
        if found != step or {float(into["w"].min()), float(into["w"].max()), into["n"]} != {value}:
            raise RuntimeError(f"step {found} was loaded, with n={into['n']}")
        said.append(f"loaded {found}")

    def make() -> cloudckpt.Checkpointer:
        return cloudckpt.Checkpointer(settings["uri"], start_timeout=SECONDS, save_timeout=SECONDS)

    if settings.get("only_load"):
        with make() as checkpointer:
            loaded(4.0, checkpointer.load, 4)
        return said
    with make() as checkpointer:
        if settings.get("print_like_nccl"):
            libc = ctypes.CDLL(None)
            libc.printf(b"vm:1:1 [0] NCCL INFO Bootstrap: Using eth0\n")
            libc.fflush(None)
        if settings.get("cwd") == "gone before the first save":
            leave_folder(where)
        limits(settings, checkpointer, state, said)
        checkpointer.save(1, state(1.0))
        said.append("saved 1")
        if settings.get("cwd") == "gone after the first save":
            leave_folder(where)
        said.append(f"saved {checkpointer.async_save(2, state(2.0)).result(SECONDS).step} in the background")
        process = checkpointer._executor.pid
        if process is None:
            raise RuntimeError("there is no checkpoint process")
        os.kill(process, signal.SIGSTOP)
        handle = checkpointer.async_save(3, state(3.0))
        os.kill(process, signal.SIGKILL)
        said.append(f"3 failed: {type(handle.exception(SECONDS)).__name__}")
        checkpointer.save(4, state(4.0))
        said.append("saved 4")
        loaded(4.0, checkpointer.load, 4)
    with make() as fresh:
        loaded(2.0, lambda into: fresh.load(into, step=2), 2)
    return said


def leave_folder(where: Path) -> None:
    """Have a working directory that is gone."""
    folder = tempfile.mkdtemp(dir=where)
    os.chdir(folder)
    shutil.rmtree(folder)


def limits(
    settings: dict[str, Any], checkpointer: Any, state: Callable[[float], Any], said: list[str]
) -> None:
    """Narrow the control group that this process is in, see a save fail, and widen it again."""
    import cloudckpt  # noqa: PLC0415 - see main

    group, of = settings.get("group"), settings.get("limit")
    if of == "files":
        few_files(settings["spare"], checkpointer, state(1.0), said)
    if not group or not of:
        return
    if of == "too late":
        run_out(Path(group) / "memory.limit_in_bytes", checkpointer, state(1.0), said)
        return
    if of == "memory":
        from cloudckpt.executor.snapshot.memory_limits import PROCESS_BYTES  # noqa: PLC0415

        file = Path(group) / "memory.limit_in_bytes"
        stat = dict(line.split() for line in (Path(group) / "memory.stat").read_text().splitlines())
        used = int(stat["total_rss"]) + int(stat.get("total_shmem", 0))
        values = state(1.0)  # the one under way is this process's own
        used += values["w"].nbytes
        file.write_text(str(used + values["w"].nbytes + PROCESS_BYTES + settings["margin_mib"] * MIB))
        wide = "-1"
        if settings["margin_mib"] > 0:
            return
    else:
        file = Path(group) / "pids.max"
        values, wide = state(1.0), "max"
        now = int((Path(group) / "pids.current").read_text())
        file.write_text(str(now + settings["spare"]))
    try:
        checkpointer.save(1, values)
        said.append("not limited")
    except cloudckpt.CheckpointError as error:
        said.append(f"limited: {type(error).__name__}: {error}")
    file.write_text(wide)


def run_out(limit: Path, checkpointer: Any, values: dict[str, Any], said: list[str]) -> None:
    """Take more memory than the group has, while the checkpoint process serves a save."""
    checkpointer.warmup(values)
    os.kill(checkpointer._executor.pid, signal.SIGSTOP)
    handle = checkpointer.async_save(1, values)
    used = int((limit.parent / "memory.usage_in_bytes").read_text())
    limit.write_text(str(used + 32 * MIB))
    # While the memory of one that was killed is freed, the kernel may kill another: this, and not the job.
    hungry = subprocess.Popen([sys.executable, "-I", "-S", "-c", HUNGRY], stdin=subprocess.PIPE)
    error = handle.exception(SECONDS)
    said.append(f"{type(error).__name__}: {error}")
    limit.write_text("-1")
    hungry.kill()
    hungry.communicate()


def few_files(spare: int, checkpointer: Any, values: dict[str, Any], said: list[str]) -> None:
    """Leave this process so many descriptors, ask the store, save, and lift the limit."""
    import cloudckpt  # noqa: PLC0415 - see main

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208 - the folder has its own
    for fd in range(highest):  # so that no lower number is free
        try:
            os.fstat(fd)
        except OSError:
            os.dup2(0, fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + spare, limits[1]))
    for ask in (checkpointer.all_steps, lambda: checkpointer.save(1, values)):
        try:
            ask()
            said.append("not limited")
        except cloudckpt.CheckpointError as error:
            said.append(f"limited: {type(error).__name__}: {error}")
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    try:
        outcome: dict[str, Any] = {"said": main(given)}
    except BaseException as error:
        outcome = {"raised": f"{type(error).__name__}: {error}", "notes": getattr(error, "__notes__", [])}
        Path(given["report"]).write_text(json.dumps(outcome))
        raise
    Path(given["report"]).write_text(json.dumps(outcome))
