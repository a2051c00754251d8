"""Memory that control groups and the machine leave is read as the kernel means it; odd files are no limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudckpt.backends.errors import ExecutorError
from cloudckpt.executor.snapshot.memory_limits import killer_since, kills, least_room, require

MIB = 1 << 20


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


MEMINFO = "MemTotal: 90 kB\nMemAvailable: 8192 kB\n"


@pytest.mark.parametrize(
    ("group", "files", "free"),
    [
        ("0::/", {}, 8 << 20),
        ("0::/", {"memory.max": "max", "memory.current": "5"}, 8 << 20),
        ("0::/", {"memory.max": "4194304", "memory.current": "3145728"}, 1 << 20),
        ("0::/a/b", {"a/memory.max": "2097152", "a/memory.current": "0", "a/b/memory.max": "max"}, 2 << 20),
        ("0::/", {"memory.max": "9", "memory.current": "9", "memory.stat": "anon 1\ninactive_file 4"}, 4),
        (
            "4:memory:/x",
            {"memory/memory.limit_in_bytes": "1048576", "memory/memory.usage_in_bytes": "1048576"},
            0,
        ),
        ("3:cpu:/x", {"memory/memory.limit_in_bytes": "1", "memory/memory.usage_in_bytes": "1"}, 8 << 20),
    ],
    ids=[
        "none",
        "no limit",
        "a limit",
        "a limit above",
        "a cache",
        "of the first version",
        "of another kind",
    ],
)
def test_memory_is_what_the_machine_and_every_control_group_leave(
    tmp_path: Path, group: str, files: dict[str, str], free: int
) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    for name, text in {"meminfo": MEMINFO, "self/cgroup": f"{group}\n"}.items():
        (proc / name).parent.mkdir(parents=True, exist_ok=True)
        (proc / name).write_text(text)
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    room = least_room(proc, groups)
    assert room is not None and room.nbytes == free


def test_a_need_above_the_room_names_the_limit_and_whose_it_is(tmp_path: Path) -> None:
    proc = written(tmp_path / "proc", {"meminfo": MEMINFO, "self/cgroup": "0::/job\n"})
    used = {"job/memory.max": f"{4 * MIB}", "job/memory.current": f"{3 * MIB}"}
    groups = written(tmp_path / "cgroup", used)
    require(MIB, "a snapshot", proc=proc, groups=groups)
    with pytest.raises(ExecutorError) as raised:
        require(2 * MIB, "a snapshot", proc=proc, groups=groups)
    said = "a snapshot needs 2 MiB of memory, and 1 MiB are left of 4 MiB, the limit of the control group"
    assert said in str(raised.value)
    assert str(groups / "job") in str(raised.value)
    assert "docker run --memory" in str(raised.value)


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({"memory.swap.max": "max"}, 3),
        ({"memory.swap.max": f"{MIB}", "memory.swap.current": "0"}, 2),
        ({"memory.swap.max": "0", "memory.swap.current": "0"}, 1),
    ],
)
def test_swap_that_a_group_may_use_counts(tmp_path: Path, files: dict[str, str], room: int) -> None:
    proc = written(tmp_path / "proc", {"meminfo": f"{MEMINFO}SwapFree: 2048 kB\n", "self/cgroup": "0::/\n"})
    limit = {"memory.max": f"{4 * MIB}", "memory.current": f"{3 * MIB}"}
    groups = written(tmp_path / "cgroup", limit | files)
    require(room * MIB, "a snapshot", proc=proc, groups=groups)
    with pytest.raises(ExecutorError):
        require(room * MIB + 1, "a snapshot", proc=proc, groups=groups)


@pytest.mark.parametrize(
    "odd", ["", "\0", "max", "-1", "nonsense\n\nmore", "0:memory", "x" * 10_000, "\udcff"]
)
def test_odd_files_are_no_limit(tmp_path: Path, odd: str) -> None:
    names = ("memory.max", "memory.current", "memory.stat", "memory.events", "memory.swap.max")
    for text in (odd, f"0::/\n{odd}"):
        proc = tmp_path / "proc"
        for name in ("meminfo", "vmstat", "self/cgroup"):
            (proc / name).parent.mkdir(parents=True, exist_ok=True)
            (proc / name).write_bytes(
                (text if name == "self/cgroup" else odd).encode(errors="surrogateescape")
            )
        for name in names:
            (tmp_path / name).write_bytes(odd.encode(errors="surrogateescape"))
        require(1 << 60, "a snapshot", proc=proc, groups=tmp_path)
        assert kills(proc, tmp_path) == {}


def test_the_group_that_killed_a_process_is_known_by_its_counter(tmp_path: Path) -> None:
    proc = written(tmp_path / "proc", {"self/cgroup": "0::/a\n", "vmstat": "nr_free 1\noom_kill 7\n"})
    groups = written(tmp_path / "cgroup", {"a/memory.events": "oom 1\noom_kill 0\n"})
    before = kills(proc, groups)
    assert killer_since(before, proc, groups) is None
    written(groups, {"a/memory.events": "oom 2\noom_kill 1\n"})
    written(proc, {"vmstat": "nr_free 1\noom_kill 8\n"})
    assert killer_since(before, proc, groups) == f"the control group {groups / 'a'}"
