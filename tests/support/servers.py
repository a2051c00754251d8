"""Real S3 servers on loopback, each a subprocess with a port of its own.

    with moto_server() as server:
        bucket = server.new_bucket()

A server is found ready by asking it, and is gone when its context ends or its starter dies: it runs in a
process group of its own, which is killed as a whole, and the kernel kills it with the thread that started it.
"""

from __future__ import annotations

import contextlib
import functools
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
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import psutil
from botocore.config import Config

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

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


class _GoneEarlyError(ServerStartError):
    """The process ended by itself, perhaps because its port was taken in the meantime."""


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running S3 server."""

    name: str
    endpoint: str
    """URL without a trailing slash."""
    key: str
    secret: str = field(repr=False)
    pid: int

    @property
    def credentials(self) -> tuple[str, str]:
        """Access key and secret key."""
        return self.key, self.secret

    @property
    def storage_options(self) -> dict[str, str]:
        """The credentials as s3fs names them."""
        return {"key": self.key, "secret": self.secret}

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which any S3 client finds this server without being told."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> S3Client:
        """Return a boto3 client, shared by all callers, to look at the server round the code under test."""
        return _client(self)

    def new_bucket(self) -> str:
        """Create an empty bucket with a fresh name and return the name."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name


@functools.cache
def _client(server: S3Server) -> S3Client:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.key,
        aws_secret_access_key=server.secret,
        config=Config(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def moto_server() -> AbstractContextManager[S3Server]:
    """Run moto's server."""

    def command(port: int) -> list[str]:
        return [_script("moto_server"), "-H", HOST, "-p", str(port)]

    return served_by("moto", command)


def ministack_server() -> AbstractContextManager[S3Server]:
    """Run MiniStack with its S3 service alone."""

    def command(port: int) -> list[str]:
        settings = {"BIND_HOST": HOST, "MINISTACK_HOST": HOST, "GATEWAY_PORT": str(port), "SERVICES": "s3"}
        return ["env", *(f"{key}={value}" for key, value in settings.items()), _script("ministack")]

    return served_by("ministack", command)


def rclone_server(folder: Path | None = None) -> AbstractContextManager[S3Server]:
    """Run ``rclone serve s3`` over memory or a folder. It alone of the three refuses wrong credentials."""

    def command(port: int) -> list[str]:
        options = ["--config", os.devnull, "--auth-key", "test,testtest", "--addr", f"{HOST}:{port}"]
        return [_script("rclone"), "serve", "s3", *options, str(folder or ":memory:")]

    return served_by("rclone", command)


SERVERS: dict[str, Callable[[], AbstractContextManager[S3Server]]] = {
    "moto": moto_server,
    "ministack": ministack_server,
    "rclone": rclone_server,
}


def unused_port() -> int:
    """Return a port that nothing listened on a moment ago: for an endpoint that refuses."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def served_by(name: str, command: Callable[[int], list[str]]) -> Iterator[S3Server]:
    """Run the server that ``command`` starts on the port given to it."""
    with contextlib.ExitStack() as stack:
        yield _entered(stack, name, command)


def _entered(stack: contextlib.ExitStack, name: str, command: Callable[[int], list[str]]) -> S3Server:
    for _ in range(STARTS - 1):
        # Between our look at a free port and the server's bind another process may take it.
        with contextlib.suppress(_GoneEarlyError):
            return stack.enter_context(_started(name, command))
    return stack.enter_context(_started(name, command))


@contextlib.contextmanager
def _started(name: str, command: Callable[[int], list[str]]) -> Iterator[S3Server]:
    port = unused_port()
    folder = Path(tempfile.mkdtemp(prefix=f"cloudckpt-{name}-"))
    log = folder / "log"
    keep = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    helper = [sys.executable, "-S", "-I", "-c", _DIES_WITH_PARENT, str(os.getpid())]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*helper, *command(port)],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**keep, "TMPDIR": str(folder)},
            cwd=folder,
            start_new_session=True,
        )
    try:
        _wait_until_ready(name, process, port, log)
        yield S3Server(name, f"http://{HOST}:{port}", "test", "testtest", process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(name: str, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until this very process listens and answers HTTP; another's server on the port doesn't count."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise _GoneEarlyError(f"{name} ended with {process.returncode}:\n{_tail(log)}")
        if _listens(process.pid, port) and _answers(port):
            return
        time.sleep(0.05)
    raise ServerStartError(f"{name} was not ready within {START_SECONDS:.0f} s:\n{_tail(log)}")


def _listens(pid: int, port: int) -> bool:
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
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def _tail(log: Path) -> str:
    return log.read_bytes()[-8000:].decode(errors="replace")


def _script(name: str) -> str:
    """Return a console script of this environment, or else the one on the path."""
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ServerStartError(f"{name} is not installed; install the test requirements")
    return found
