"""Storage writers that do harm in the checkpoint process that runs them, at a chosen point of a save."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

import cloudckpt
from cloudckpt.backends.save import commit

RAISE, EXIT_17, KILL, STOP, WAIT = "raise", "exit 17", "kill", "stop", "wait"
SET_UP, WRITE_DATA, WROTE, FINISH, PUT, COMMITTED, COMMITTED_KILL_1 = (
    "set_up", "write_data", "wrote", "finish", "put", "committed", "committed, kill rank 1",
)  # fmt: skip


class Sabotage(RuntimeError):
    """The failure that a test asked for."""


class Saboteur(cloudckpt.StorageWriter):
    """Our writer, which does ``what`` on ``rank`` when it comes to ``where``.

    Ranks leave their process ids in ``folder``; a ``WAIT`` ends when a file ``go`` appears there.
    """

    def __init__(
        self, uri: str, where: str | None, what: str = RAISE, rank: int = 0, *, folder: Path, **options: Any
    ) -> None:
        super().__init__(uri, **options)
        self.where, self.what, self.which, self.folder = where, what, rank, folder

    def __getstate__(self) -> dict[str, Any]:
        mine = {"where": self.where, "what": self.what, "which": self.which, "folder": self.folder}
        return super().__getstate__() | {"mine": mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).update(state["mine"])

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.me = kwargs.get("rank") or 0
        (self.folder / f"pid-{self.me}").write_text(str(os.getpid()))
        self._at(SET_UP)
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self._at(WRITE_DATA)
        written = super().write_data(plan, planner)
        self._at(WROTE)
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._at(FINISH)
        module: Any = commit
        put = module.put_metadata

        def sabotaged(*args: Any) -> None:
            self._at(PUT)
            put(*args)

        module.put_metadata = sabotaged
        try:
            super().finish(metadata, results)
        finally:
            module.put_metadata = put
        self._at(COMMITTED)
        if self.where == COMMITTED_KILL_1:
            os.kill(int((self.folder / "pid-1").read_text()), signal.SIGKILL)
            threading.Event().wait()  # whoever waits for this process learns of the other's end

    def _at(self, where: str) -> None:
        if where != self.where or self.me != self.which:
            return
        (self.folder / "reached").touch()
        match self.what:
            case "raise":
                raise Sabotage(f"sabotaged on rank {self.me} at {where}")
            case "exit 17":
                os._exit(17)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case _:
                while not (self.folder / "go").exists():
                    time.sleep(0.01)
