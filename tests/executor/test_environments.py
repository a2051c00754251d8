"""A job saves, survives its checkpoint process and loads in whatever environment a container makes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support import seccomp
from support.mounts import SMALL_SHM, private_mounts
from support.servers import S3Server
from support.trainers import TrainerProcess

JOB = Path(__file__).parents[1] / "support" / "container_job.py"
GROUPS = Path("/sys/fs/cgroup")
STRANGER = "54321"
"""A user and a group without a name."""
WHOLE = [
    "saved 1",
    "saved 2 in the background",
    "3 failed: ExecutorDiedError",
    "saved 4",
    "loaded 4",
    "loaded 2",
]
SHELL = ("sh", "-c")

CLOSED = (*SHELL, 'exec "$@" <&- >&- 2>&-', "sh")
FEW_FILES = (*SHELL, 'ulimit -n 64; exec "$@"', "sh")
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro / && ! touch /usr/written && exec "$@"'
C_LOCALE: dict[str, str | None] = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@dataclass(frozen=True)
class Environment:
    """What is different for a job."""

    flags: tuple[str, ...] = ()
    """Of the interpreter."""
    variables: dict[str, str | None] = field(default_factory=dict)
    """Of its environment; None for one that is unset."""
    prefix: tuple[str, ...] = ()
    """Before its command line."""
    settings: dict[str, Any] = field(default_factory=dict)
    """For the job itself."""
    on_s3: bool = False
    streams: str = ""
    """``"full"``, for standard output and error that nobody reads."""
    mounts: str = ""
    """A script that changes mounts, of which `$0` is the folder that can be written to."""
    stranger: bool = False
    refused: int = 0
    """Error number of the calls that a sandbox refuses, or that the system does not have."""


ENVIRONMENTS = {
    "as usual": Environment(),
    "closed descriptors": Environment(prefix=CLOSED, settings={"print_like_nccl": True}, on_s3=True),
    "full stderr and stdout": Environment(streams="full"),
    "working directory gone before the first save": Environment(
        settings={"cwd": "gone before the first save"}, on_s3=True
    ),
    "working directory gone after the first save": Environment(settings={"cwd": "gone after the first save"}),
    "-OO": Environment(flags=("-OO",)),
    "-I": Environment(flags=("-I",)),
    "PYTHONWARNINGS=error": Environment(variables={"PYTHONWARNINGS": "error"}, on_s3=True),
    "PYTHONDEVMODE=1": Environment(variables={"PYTHONDEVMODE": "1"}),
    "LANG=C": Environment(variables=C_LOCALE, on_s3=True),
    "a user without a name": Environment(stranger=True, variables={"HOME": None}, on_s3=True),
    "read-only root": Environment(mounts=READ_ONLY),
    "small /dev/shm": Environment(mounts=SMALL_SHM),
    "no HOME": Environment(variables={"HOME": None, "USER": None, "LOGNAME": None}, on_s3=True),
    "64 descriptors": Environment(prefix=FEW_FILES, on_s3=True),
    "a sandbox that refuses calls": Environment(refused=errno.EPERM),
    "a system without these calls": Environment(refused=errno.ENOSYS),
    "one core": Environment(prefix=("taskset", "-c", "0")),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_whole_job(name: str, tmp_path: Path, s3_server_named: Callable[[str], S3Server]) -> None:
    environment = ENVIRONMENTS[name]
    tmp_path.chmod(0o777)
    uri = f"file://{tmp_path}/run"
    variables: dict[str, str] = {}
    if environment.on_s3:
        moto = s3_server_named("moto")
        uri, variables = f"s3://{moto.new_bucket()}/run", moto.environment
    settings = {**environment.settings, "uri": uri}
    assert run(environment, tmp_path, variables, settings) == {"said": WHOLE}
    told = run(environment, tmp_path, variables, {**settings, "only_load": True})
    assert told == {"said": ["loaded 4"]}


@pytest.mark.parametrize("margin", [-8, 24])
def test_a_memory_limit_below_the_need_is_an_error_and_one_above_it_is_enough(
    margin: int, tmp_path: Path
) -> None:
    with control_group("memory") as group:
        environment = Environment(
            prefix=into(group), settings={"limit": "memory", "group": str(group), "margin_mib": margin}
        )
        told = run(environment, tmp_path, {}, {**environment.settings, "mib": 200, "uri": f"{tmp_path}/run"})
    if margin > 0:
        assert told == {"said": WHOLE}
        return
    error, *rest = told["said"]
    assert error.startswith("limited: ExecutorError: ")
    assert str(group) in error
    assert rest == WHOLE


def test_where_memory_runs_out_the_checkpoint_process_goes_and_the_error_names_the_group(
    tmp_path: Path,
) -> None:
    with control_group("memory") as group:
        environment = Environment(prefix=into(group), settings={"limit": "too late", "group": str(group)})
        told = run(environment, tmp_path, {}, {**environment.settings, "uri": f"{tmp_path}/run"})
    error, *rest = told["said"]
    assert error.startswith("ExecutorDiedError: ")
    assert f"was killed by SIGKILL (exit code -9), as the control group {group} ran out of memory" in error
    assert "Give the job more memory" in error
    assert rest == WHOLE


@pytest.mark.parametrize("spare", [0, 1, 3, 6])
def test_threads_that_can_t_be_started_fail_a_save_with_the_cure(spare: int, tmp_path: Path) -> None:
    with control_group("pids") as group:
        environment = Environment(
            prefix=into(group), settings={"limit": "pids", "group": str(group), "spare": spare}
        )
        told = run(environment, tmp_path, {}, {**environment.settings, "uri": f"{tmp_path}/run"})
    error, *rest = told["said"]
    assert error.startswith("limited: ")
    assert "ulimit -u" in error
    assert rest == WHOLE


@pytest.mark.parametrize("warm", [False, True])
def test_a_rank_without_threads_tells_the_others_at_once(warm: bool, tmp_path: Path) -> None:
    """They would wait for `start_timeout`, or with a process that serves for `save_timeout`."""
    arguments: dict[str, Any] = {
        "init_method": f"file://{tmp_path}/meeting",
        "world_size": 2,
        "executor": {"save_timeout": 250.0, "start_timeout": 250.0},
    }
    with control_group("pids") as group, contextlib.ExitStack() as stack:
        made = [
            stack.enter_context(
                TrainerProcess(tmp_path, *(into(group) if rank else ()), rank=rank, **arguments)
            )
            for rank in range(2)
        ]
        both = [trainer.started() for trainer in made]
        if warm:
            for trainer in both:
                trainer.tell("warmup")
            for trainer in both:
                trainer.answer()
        (group / "pids.max").write_text((group / "pids.current").read_text())
        for trainer in both:
            trainer.tell("begin", 1)
        for trainer in both:
            trainer.answer()
        for trainer in both:
            outcome = trainer.ask("result")
            assert outcome["error"] == "ExecutorError"
            assert "ulimit -u" in outcome["said"]
        (group / "pids.max").write_text("max")
        for trainer in both:
            trainer.tell("begin", 2)
        for trainer in both:
            trainer.answer()
        for trainer in both:
            assert trainer.ask("result") == {"error": None}


@pytest.mark.parametrize("spare", [0, 1, 2, 4])
def test_too_many_open_files_fail_a_request_and_a_save_with_the_cure(
    spare: int, tmp_path: Path, moto: S3Server
) -> None:
    environment = Environment(settings={"limit": "files", "spare": spare})
    settings = {**environment.settings, "uri": f"s3://{moto.new_bucket()}/run"}
    asked, saved, *rest = run(environment, tmp_path, moto.environment, settings)["said"]
    for error in (asked, saved) if spare == 0 else (saved,):
        assert error.startswith("limited: ")
        assert "ulimit -n" in error
    assert rest == WHOLE


def run(
    environment: Environment, folder: Path, variables: dict[str, str], settings: dict[str, Any]
) -> dict[str, Any]:
    """Run the job, and return what it reports."""
    report = folder / "report"
    report.unlink(missing_ok=True)
    settings = {**settings, "report": str(report)}
    command = [
        *prefix_of(environment, folder),
        sys.executable,
        *environment.flags,
        str(JOB),
        json.dumps(settings),
    ]
    changed = {**os.environ, **variables, **environment.variables}
    with contextlib.ExitStack() as stack:
        streams: dict[str, Any] = {"capture_output": True}
        if environment.streams == "full":
            full = stack.enter_context(full_pipe())
            streams = {"stdout": full, "stderr": full}
        ran = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            check=False,
            cwd=folder,
            env={key: value for key, value in changed.items() if value is not None},
            timeout=200,
            **streams,
        )
    said = (ran.stderr or b"").decode(errors="replace")
    assert report.exists(), f"exit status {ran.returncode}\n{said}"
    told: dict[str, Any] = json.loads(report.read_text())
    assert ran.returncode == 0, f"{told}\n{said}"
    return told


def prefix_of(environment: Environment, folder: Path) -> tuple[str, ...]:
    """Return what runs a command in the environment, or skip."""
    prefix = environment.prefix
    if environment.mounts:
        mounts = private_mounts()
        if mounts is None:
            pytest.skip("needs to mount, which this user may not")
        prefix = (*mounts, "sh", "-c", environment.mounts, str(folder), *prefix)
    if environment.stranger:
        if os.geteuid() != 0 or shutil.which("setpriv") is None:
            pytest.skip("needs root, and setpriv, to become another user")
        # The right to look into folders: the interpreter may be in one that is closed to strangers.
        look = ("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")
        prefix = ("setpriv", "--reuid", STRANGER, "--regid", STRANGER, "--clear-groups", *look, *prefix)
    if environment.refused:
        if not seccomp.CALLS:
            pytest.skip("the numbers of this machine's system calls are not known here")
        numbers = ",".join(map(str, seccomp.CALLS.values()))
        prefix = (sys.executable, str(seccomp.__file__), str(environment.refused), numbers, *prefix)
    if prefix and shutil.which(prefix[0]) is None:
        pytest.skip(f"needs {prefix[0]}, which is not installed")
    return prefix


@contextlib.contextmanager
def full_pipe() -> Iterator[int]:
    """The write end of a pipe that is full, and that nobody reads."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 4096)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x")
    os.set_blocking(write, True)
    try:
        yield write
    finally:
        os.close(read)
        os.close(write)


@contextlib.contextmanager
def control_group(kind: str) -> Iterator[Path]:
    """A control group of the test's own below this process's, of version 1."""
    parent = GROUPS / kind
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kind in kinds.split(",") and (GROUPS / kind / path.lstrip("/")).is_dir():
                parent = GROUPS / kind / path.lstrip("/")
        group = parent / f"cloudckpt-{uuid.uuid4().hex[:8]}"
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs a control group of version 1 for {kind}: {error}")
    try:
        if not (group / "cgroup.procs").exists():
            pytest.skip(f"needs a control group of version 1 for {kind}")
        yield group
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def into(group: Path) -> tuple[str, ...]:
    return (*SHELL, f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")
