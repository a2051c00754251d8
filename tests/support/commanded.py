"""Ranks of a job that do what a test tells them, one command at a time."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import psutil

from support.sites import Host
from support.trainers import of_rank

PHASES = ("waiting", "planning", "writing", "committing", "committed")


class Rank:
    """A rank of a job of two, in a process of its own.

    Args:
        rank: its number.
        master: host and port of the job's store.
        uri: where it saves.
        options: of its Checkpointer, its timeouts among them.
        host: where it runs; None for this one.
        environment: variables besides those of the job.
    """

    def __init__(
        self,
        rank: int,
        master: tuple[str, int],
        uri: str,
        options: Mapping[str, Any],
        *,
        host: Host | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        command = [sys.executable, "-m", "support.partition_job", uri, json.dumps(options)]
        self._patience = options["start_timeout"] + options["save_timeout"] + 60.0
        self._process = subprocess.Popen(
            command if host is None else host.command(*command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**of_rank(rank, 2, *master, LOCAL_RANK="0"), **(environment or {})},
        )
        self.told: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"rank-{rank}", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    @property
    def memory(self) -> int:
        """Bytes of memory that the rank has in use."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def ask(self, *command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(command)}\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Return the next report that is no phase."""
        while "phase" in (told := self.told.get(timeout=self._patience)):
            pass
        return told

    def enter(self, phase: str) -> bool:
        """Wait until the save is in a phase; False if it ended before."""
        at = PHASES.index(phase)
        while "phase" in (told := self.told.get(timeout=self._patience)):
            if told["phase"] in PHASES and PHASES.index(told["phase"]) >= at:
                return True
        self._put_back(told)
        return False

    def _put_back(self, told: dict[str, Any]) -> None:
        self.told.put(told)  # nothing follows an answer until the next command

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.told.put(json.loads(line))
        self.told.put({"gone": True})
