"""The checkpoint process as its trainer holds it: started, spoken to, ended."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

from cloudckpt.backends.errors import ExecutorError
from cloudckpt.backends.system import descriptors, system_limits
from cloudckpt.executor.messages import ArenaNews, Hello, SaveRequest
from cloudckpt.executor.progress import ProgressBoard
from cloudckpt.executor.snapshot import memory_limits
from cloudckpt.executor.snapshot.arena import Arena
from cloudckpt.executor.worker import interpreter, main_unpickler, process_setup

_START = (
    # SIGTERM waits for the thread that takes back what a save left open: no thread may be without this mask.
    # SIGUSR1, which some schedulers send to every process of a job, is for the trainer to act on.
    "import json, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1}); "
    "sys.path[:] = json.loads(sys.argv[1])\n"
    # When memory runs out, the kernel takes this process first: the trainer can go on without it. Said before
    # the imports, which take most of its memory.
    "import contextlib, pathlib\n"
    "with contextlib.suppress(OSError): pathlib.Path('/proc/self/oom_score_adj').write_text('1000')\n"
    "from cloudckpt.executor.worker.worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)
"""The whole program: nothing of the trainer's main script runs again."""

_SEND_TIMEOUT = 60
"""Seconds that a message may wait for the process to read it."""


class CheckpointProcess:
    """One checkpoint process of this rank.

    It is made on the supervisor's thread and ends with it: the kernel kills a process whose parent thread is
    gone. Its process group is its own, so that Ctrl-C at the terminal reaches the trainer alone.
    """

    def __init__(self, hello: Hello, board: ProgressBoard) -> None:
        self.generation = hello.generation
        self.serves = False
        self._described: dict[int, int] = {}
        self._kills = memory_limits.kills()
        with system_limits.explained("start the checkpoint process"), contextlib.ExitStack() as undo:
            ours, theirs = descriptors.socket_pair()
            undo.callback(ours.close)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_TIMEOUT, 0))
            with theirs:
                self._process = _started(theirs.fileno(), board.fd)
            undo.callback(self._process.wait)
            undo.callback(self._process.kill)
            self._exit = _ExitWatch(self._process)
            self._connection = Connection(ours.detach())
            undo.pop_all()
        self.send(hello)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True if the process has not ended."""
        return self._process.poll() is None

    @property
    def waitables(self) -> list[Any]:
        """Return the objects to wait on: its messages, and its end."""
        return [self._connection, self._exit]

    def send(self, message: object) -> None:
        """Send a message.

        Raises:
            OSError: the process is gone, or does not read.
        """
        self._connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def send_save(self, request: SaveRequest, arena: Arena) -> None:
        """Send a save, and the arena's descriptor when the process doesn't hold it yet.

        Raises:
            OSError: the process is gone, or does not read.
        """
        self.send(request)
        if request.arena.described:
            reduction.send_handle(self._connection, arena.fd, self.pid)
            self._described[request.arena.index] = arena.identity

    def news_of(self, index: int, arena: Arena) -> ArenaNews:
        """Return the description of an arena for the process."""
        return ArenaNews(index, arena.nbytes, described=self._described.get(index) != arena.identity)

    def receive(self) -> Any:
        """Return the next message, or None when there is none.

        Raises:
            EOFError, OSError: the process is gone.
        """
        if not self._connection.poll():
            return None
        return pickle.loads(self._connection.recv_bytes())  # noqa: S301 - from our own process

    def killer(self) -> str | None:
        """Return who has killed a process for want of memory since this one was started."""
        return memory_limits.killer_since(self._kills)

    def exit_code(self, timeout: float) -> int | None:
        """Its exit code, negative for a signal; None when it doesn't end within ``timeout`` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def end(self, timeout: float) -> bool:
        """End it, and tell whether it is gone.

        It has ``timeout`` seconds to take back what the save under way has left open; then it is killed.
        """
        self._process.terminate()
        gone = self.exit_code(timeout) is not None
        if not gone:
            self._process.kill()
            gone = self.exit_code(_SEND_TIMEOUT) is not None
        self._connection.close()
        self._exit.close()
        return gone


def _started(*fds: int) -> subprocess.Popen[bytes]:
    """Start the program, which inherits these descriptors."""
    search_path = json.dumps(main_unpickler.search_path())
    return subprocess.Popen(  # noqa: S603 - this interpreter, on our own module
        [sys.executable, *interpreter.options(), "-c", _START, search_path, *map(str, fds)],
        stdin=subprocess.DEVNULL,
        pass_fds=fds,
        process_group=0,
        # Libraries look for their own files from there, which fails in one that was deleted.
        cwd=None if main_unpickler.working_directory() is not None else "/",
        env=os.environ | {"OMP_NUM_THREADS": str(process_setup.threads())},
    )


class _ExitWatch:
    """Something that `multiprocessing.connection.wait` finds ready when the process has ended.

    The end of the connection would not do: a process that the trainer forked may hold its other side open.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        fd = _pidfd(process.pid)
        if fd is not None:
            self._fd = fd
            return
        self._fd, write = descriptors.pipe()
        try:
            system_limits.start(
                threading.Thread(
                    target=_close_at_exit, args=(process, write), name="cloudckpt-exit", daemon=True
                )
            )
        except ExecutorError:
            os.close(self._fd)
            os.close(write)
            raise

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)


def _pidfd(pid: int) -> int | None:
    """Return a descriptor of a process; None where the system has none, or a sandbox refuses it.

    Raises:
        OSError: there is no descriptor left.
    """
    try:
        return descriptors.kept_clear(os.pidfd_open(pid)) if hasattr(os, "pidfd_open") else None
    except OSError as error:
        if error.errno in system_limits.REFUSED:
            return None
        raise


def _close_at_exit(process: subprocess.Popen[bytes], fd: int) -> None:
    process.wait()
    os.close(fd)


def exit_words(code: int | None) -> str:
    """Describe the end of a process in words."""
    if code is None:
        return "is gone"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name} (exit code {code})"
