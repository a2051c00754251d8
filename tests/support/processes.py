"""Background processes of test servers: a folder of their own, logs, and an end that leaves nothing.

    with daemons("juicefs") as family:
        family.call("juicefs", "format", ...)
        process = family.start("juicefs", "gateway", ...)
        family.wait(process, port)

Each process runs in a process group of its own, which is killed as a whole when the context ends. The kernel
kills it with the thread that started it.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")

HOST = "127.0.0.1"
START_SECONDS = 60.0
STARTS = 3

# Runs the command given to it, having asked the kernel to kill it when its parent's thread ends. An exec'd
# helper instead of preexec_fn, which may deadlock in a parent with threads.
_DIES_WITH_PARENT = """
import ctypes, os, signal, sys
parent = int(sys.argv[1])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != parent:
    sys.exit("the parent died first")
os.execvp(sys.argv[2], sys.argv[2:])
"""


class ServerStartError(RuntimeError):
    """A server did not come up; the message ends with its log."""


class NotInstalledError(ServerStartError):
    """A program of the server is not installed; the message names its package."""


class EndedEarlyError(ServerStartError):
    """A process ended by itself, perhaps because its port was taken in the meantime."""


class Daemons:
    """The processes of one server, which share a folder and end together."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        """Removed when the server ends."""
        self._processes: list[subprocess.Popen[bytes]] = []
        keep = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
        self._environment = {**keep, "TMPDIR": str(folder)}

    def call(self, *command: str | Path, **environment: str) -> str:
        """Run a program to its end and return what it printed.

        Raises:
            ServerStartError: It failed.
        """
        done = subprocess.run(
            [str(part) for part in command],
            env={**self._environment, **environment},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            timeout=START_SECONDS,
        )
        if done.returncode:
            program = Path(command[0]).name
            raise ServerStartError(
                f"{self.name}: {program} ended with {done.returncode}:\n{done.stderr[-4000:]}"
            )
        return done.stdout

    def start(self, *command: str | Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a program that runs until the server ends."""
        helper = [sys.executable, "-S", "-I", "-c", _DIES_WITH_PARENT, str(os.getpid())]
        with self._log(len(self._processes)).open("wb") as sink:
            process = subprocess.Popen(
                [*helper, *(str(part) for part in command)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**self._environment, **environment},
                cwd=self.folder,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def wait(self, process: subprocess.Popen[bytes], port: int) -> None:
        """Wait until this very process listens and answers HTTP. Another's server on the port does not count.

        Raises:
            EndedEarlyError: The process has ended.
            ServerStartError: It was not ready in time.
        """
        self.wait_until(lambda: listens(process.pid, port) and _answers(port))

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        """Wait until a condition holds, while all processes live."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for process in self._processes:
                if process.poll() is not None:
                    raise EndedEarlyError(f"{self.name} ended with {process.returncode}:\n{self.tail()}")
            if is_ready():
                return
            time.sleep(0.05)
        raise ServerStartError(f"{self.name} was not ready within {START_SECONDS:.0f} s:\n{self.tail()}")

    def stop(self) -> None:
        """Kill all processes, the last one first."""
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def tail(self) -> str:
        """Return the end of each process's log."""
        logs = [self._log(number).read_bytes() for number in range(len(self._processes))]
        return "\n".join(log[-8000:].decode(errors="replace") for log in logs)

    def _log(self, number: int) -> Path:
        return self.folder / f"log-{number}"


@contextlib.contextmanager
def daemons(name: str) -> Iterator[Daemons]:
    """Make a folder for the processes of a server; kill them and remove it at the end."""
    folder = Path(tempfile.mkdtemp(prefix=f"cloudckpt-{name}-"))
    family = Daemons(name, folder)
    try:
        yield family
    finally:
        family.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def again_if_ended_early(start: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
    """Enter a context that starts a server, again where it ended at once.

    Between the look at a free port and the server's bind another process may take it.
    """
    with contextlib.ExitStack() as stack:
        for left in reversed(range(STARTS)):
            try:
                server = stack.enter_context(start())
            except EndedEarlyError:
                if not left:
                    raise
            else:
                yield server
                return


def script(name: str, package: str = "the test requirements", *, root: bool = False) -> str:
    """Return a program of this environment, or else the one on the path.

    Args:
        name: The program's name.
        package: The package that brings it, for the error.
        root: Look in the folders of administrators' programs, too.

    Raises:
        NotInstalledError: There is none.
    """
    beside = Path(sysconfig.get_path("scripts")) / name
    more = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin" if root else None
    found = str(beside) if beside.exists() else shutil.which(name, path=more)
    if found is None:
        raise NotInstalledError(f"{name} is not installed; install {package}")
    return found


def unused_ports(count: int) -> list[int]:
    """Return ports that nothing listened on a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        ports = list[int]()
        for _ in range(count):
            probe = stack.enter_context(socket.socket())
            probe.bind((HOST, 0))
            ports.append(probe.getsockname()[1])
        return ports


def unused_port() -> int:
    """Return a port that nothing listened on a moment ago: for an endpoint that refuses."""
    return unused_ports(1)[0]


def environment_command(variables: Mapping[str, str], *command: str) -> list[str]:
    """Return the command with which ``env`` runs another one with more variables."""
    return ["env", *(f"{key}={value}" for key, value in variables.items()), *command]


def listens(pid: int, port: int) -> bool:
    """Return whether a process or one of its children listens on a port."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
        connections = [connection for process in family for connection in process.net_connections("tcp")]
    except psutil.Error:
        return False
    return any(
        connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        for connection in connections
    )


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("GET", "/")
        with contextlib.closing(connection.getresponse()) as answer:
            answer.read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True
