"""Trainers in processes of their own, as a test drives them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]


def of_rank(rank: int, world_size: int, address: str, port: int, **variables: str) -> dict[str, str]:
    """The environment of one rank of a job, as a launcher makes it."""
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}",
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **variables,
    }


class TrainerRaised(RuntimeError):
    """A command raised in the trainer."""


class TrainerProcess:
    """One trainer; a method called on it by `ask` runs there.

    ``prefix`` is put before its command line, to run it on a host of the test's own.
    """

    def __init__(
        self, folder: Path, *prefix: str, environment: dict[str, str] | None = None, **arguments: Any
    ) -> None:
        self._errors = (folder / f"trainer-{arguments.get('rank', 0)}.log").open("w+")
        self.process = subprocess.Popen(
            [
                *prefix,
                sys.executable,
                "-m",
                "support.trainer",
                json.dumps({"folder": str(folder), **arguments}),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT / "tests"),
                "TORCH_CPP_LOG_LEVEL": "ERROR",
                **(environment or {}),
            },
        )
        self.pid: int = 0

    def started(self) -> Self:
        self.pid = self.answer()
        return self

    def tell(self, *command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, timeout: float = 120) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            raise AssertionError(f"no answer from the trainer\n{self.errors()}")
        answer = json.loads(line)
        if "raised" in answer:
            raise TrainerRaised(f"{answer['raised']}: {answer['said']}")
        return answer["value"]

    def ask(self, *command: Any) -> Any:
        self.tell(*command)
        return self.answer()

    def errors(self) -> str:
        self._errors.flush()
        return Path(self._errors.name).read_text()

    def kill(self) -> None:
        os.kill(self.pid or self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(30)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._errors.close()


def gone(pid: int) -> bool:
    """Whether a process that is not our child has ended; one that nobody has reaped yet has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"
