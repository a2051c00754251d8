"""Threads, processes and descriptors that the system refuses, as errors that name the limit.

``can't start new thread`` and ``Too many open files`` come up wherever something is started or opened. What
is said of them, and which setting cures them, is here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from cloudckpt.backends.errors import CheckpointError, ExecutorError

_P = ParamSpec("_P")
_T = TypeVar("_T")

_OPEN_FILES: Final = frozenset({errno.EMFILE, errno.ENFILE})
REFUSED: Final = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS})
"""Errors of a call that the system does not have, or that a sandbox such as seccomp refuses."""
_DEEPEST: Final = 16
"""Errors behind an error that are looked at."""
_GROUPS: Final = Path("/sys/fs/cgroup")


def cure(error: BaseException | None) -> str | None:
    """Return what to do about a limit of the system that an error is about; None for any other error.

    Clients of stores wrap the system's error in several of their own: those behind it are looked at, too.
    """
    for one in _behind(error):
        number = getattr(one, "errno", None)
        if number in _OPEN_FILES:
            return files_hint()
        if isinstance(one, OSError) and number in (errno.EAGAIN, errno.ENOMEM):
            return threads_hint() if number == errno.EAGAIN else "Give the job more memory"
    return None


def open_files_cure(error: BaseException | None) -> str | None:
    """Return what to do about too few descriptors, where an error is about them; None for any other error."""
    return files_hint() if any(getattr(one, "errno", None) in _OPEN_FILES for one in _behind(error)) else None


def files_hint() -> str:
    """Return what to do where too many files are open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"Raise the limit on open files (ulimit -n, now {_number(soft)})"


def threads_hint() -> str:
    """Return what to do where no thread and no process can be started."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    return (
        f"Raise the limit on processes and threads: ulimit -u (now {_number(soft)}), and pids.max of the "
        f"container (now {pids_limit() or 'unlimited'}; docker run --pids-limit)"
    )


def _number(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def pids_limit(proc: Path = Path("/proc"), groups: Path = _GROUPS) -> int | None:
    """Return the smallest ``pids.max`` of the control groups of this process; None where none is set."""
    return min((most for most, _, _ in _pids(proc, groups)), default=None)


def pids_room(proc: Path = Path("/proc"), groups: Path = _GROUPS) -> tuple[int, str] | None:
    """Return how many more processes and threads the control groups let start, and which of them says so.

    None where none has a limit.
    """
    return min(
        ((most - now, f"{folder}/pids.max") for most, now, folder in _pids(proc, groups)), default=None
    )


def _pids(proc: Path, groups: Path) -> Iterator[tuple[int, int, Path]]:
    """Yield the limit, the number of processes and the folder of each control group that limits them."""
    for folder, _ in control_groups("pids", proc, groups):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max", which is no number
            most = int((folder / "pids.max").read_text())
            yield most, int((folder / "pids.current").read_text()), folder


def control_groups(controller: str, proc: Path, groups: Path) -> Iterator[tuple[Path, int]]:
    """Return the folders of this process's control groups for a controller, and their version.

    The process's own group is first, and those above it follow.

    Args:
        controller: such as ``memory``.
        proc: where procfs is mounted.
        groups: where the control groups are mounted.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        parts = line.split(":", 2)
        if len(parts) < 3:  # noqa: PLR2004 - number, controllers, path
            continue
        _, kinds, path = parts
        if kinds and controller not in kinds.split(","):
            continue
        # In a container the group's own folder is the root that is mounted.
        root = groups / kinds if kinds else groups
        if kinds and not root.is_dir():
            root = groups / controller
        below = Path(path.lstrip("/"))
        for folder in dict.fromkeys((root / below, *(root / above for above in below.parents), root)):
            yield folder, 1 if kinds else 2


def start(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        ExecutorError: the system lets this process have no more threads.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise no_thread(thread.name, error) from error


def in_thread(ask: Callable[[], _T], name: str, *, daemon: bool = True) -> Future[_T]:
    """Return the answer to come of a thread, for a caller that waits for so long and no longer.

    Where no thread can be started, ``ask`` is called here, and its own timeouts have to do.

    Args:
        ask: returns the answer.
        name: of the thread.
        daemon: False if the interpreter should wait for the thread before it exits.
    """
    answer: Future[_T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            answer.set_exception(error)

    try:
        threading.Thread(target=run, name=name, daemon=daemon).start()
    except RuntimeError:
        run()
    return answer


def try_for(seconds: float, run: Callable[[], object], name: str) -> None:
    """Have a daemon thread call ``run``, and wait for at most so many seconds.

    Nothing is done where no thread can be started: ``run`` might never return.
    """
    thread = threading.Thread(target=run, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return
    thread.join(seconds)


def no_thread(name: str, error: RuntimeError) -> ExecutorError:
    """Return the error for a thread that could not be started."""
    return ExecutorError(f"the thread {name} could not be started: {error}", hint=threads_hint())


@contextlib.contextmanager
def explained(what: str, uri: str | None = None) -> Iterator[None]:
    """Turn an OSError of the block into an ExecutorError that names the limit.

    Args:
        what: what the block does, such as ``start the checkpoint process``.
        uri: where a save goes, if one is concerned.

    Raises:
        ExecutorError: the system refused.
    """
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise ExecutorError(
            f"could not {what}: {error.strerror or error}", uri=uri, hint=cure(error)
        ) from error


def local_ranks() -> int:
    """Return the number of ranks on this host, from LOCAL_WORLD_SIZE; 1 where it is not set."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(given)) if given.isdecimal() else 1


def processors_a_rank() -> float:
    """Return how many processors of this host each of its ranks may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    usable = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return float(usable) / local_ranks()


class Workers(ThreadPoolExecutor):
    """A pool of threads whose error names the limit where the system lets it have no more."""

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Have a thread call ``fn``.

        Raises:
            ExecutorError: no thread can be started.
        """
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError as error:
            raise no_thread(self._thread_name_prefix or "of a pool", error) from error


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes; urllib3 has them as ``reason``, botocore in its fields."""
    left: list[Any] = [error]
    seen: set[int] = set()
    while left and len(seen) < _DEEPEST:
        one = left.pop(0)
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        fields = getattr(one, "kwargs", None)
        inner = fields.get("error") if isinstance(fields, dict) else None
        left += [one.__cause__, one.__context__, getattr(one, "reason", None), inner]
