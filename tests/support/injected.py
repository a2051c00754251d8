"""Exceptions of many classes, and the places of a Checkpointer's calls where one rank raises them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from unittest import mock

import torch

from cloudckpt import Checkpointer, pending_saves, run
from cloudckpt.backends.errors import StorageError
from cloudckpt.backends.load import reader
from cloudckpt.backends.state import load_planner
from cloudckpt.executor.snapshot import arena, snapshot
from cloudckpt.state import app_state
from support import living as kept


class Particular(Exception):
    """An exception whose constructor takes more than its text, so that it does not unpickle."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} is not to be had: {reason}")
        self.name = name


class Prefixed(Exception):
    """An exception whose text grows each time that it is unpickled."""

    def __init__(self, path: str) -> None:
        super().__init__(f"can't read {path}")


class Unpicklable(Exception):
    """An exception that holds what no other process can have."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Reduced(Exception):
    """An exception that pickles without its notes."""

    def __reduce__(self) -> Any:
        return Reduced, (str(self),)


EXCEPTIONS: dict[str, Callable[[], BaseException]] = {
    "UnicodeEncodeError": lambda: UnicodeEncodeError("utf-8", "l\udcc3", 1, 2, "surrogates not allowed"),
    "OSError": lambda: OSError(28, "No space left on device", "/tmp/there"),  # noqa: S108 - a text
    "MemoryError": lambda: MemoryError("no room"),
    "RuntimeError": lambda: RuntimeError("can't start new thread"),
    "KeyError": lambda: KeyError("weight"),
    "ValueError": lambda: ValueError("seven"),
    "AssertionError": lambda: AssertionError("not so"),
    "ConnectionResetError": lambda: ConnectionResetError(104, "Connection reset by peer"),
    "StorageError": lambda: StorageError("the store is full", object_name="an-object", hint="Empty it"),
    "Particular": lambda: Particular("weight", "it is gone"),
    "Prefixed": lambda: Prefixed("weight"),
    "Reduced": lambda: Reduced("in few words"),
    "Unpicklable": lambda: Unpicklable("a lock"),
}

PLACES: dict[str, tuple[Any, str]] = {
    "newest": (run.Run, "newest"),
    "steps": (run.Run, "steps"),
    "pin": (run.Run, "pin"),
    "unpin": (run.Run, "unpin"),
    "prove": (run.Run, "prove"),
    "settle": (pending_saves.Saves, "settle"),
    "describe": (app_state.AppState, "describe"),
    "take": (app_state.AppState, "take"),
    "reserve": (arena.Arena, "reserve"),
    "snapshot": (snapshot, "take"),
    "reader": (reader.StorageReader, "__init__"),
    "fetch": (reader.StorageReader, "fetch_metadata"),
    "read_metadata": (reader.StorageReader, "read_metadata"),
    "set_up_reader": (reader.StorageReader, "set_up_storage_reader"),
    "local_plan": (load_planner.CheckpointLoadPlanner, "create_local_plan"),
    "global_plan": (load_planner.CheckpointLoadPlanner, "create_global_plan"),
    "finish_plan": (load_planner.CheckpointLoadPlanner, "finish_plan"),
    "read_data": (reader.StorageReader, "read_data"),
}
"""What raises: what is looked up by a name, and that name."""


_START_TIMEOUT = 600.0


def living(uri: str) -> tuple[Checkpointer, dict[str, Any]]:
    """Return this rank's Checkpointer of a run, made at the first call, and a new state."""
    checkpointer = kept.living(uri, start_timeout=_START_TIMEOUT)
    return checkpointer, {"weight": torch.ones(30), "sullen": Sullen(), "step": 1}


@contextlib.contextmanager
def raising(place: str, error: Callable[[], BaseException]) -> Iterator[None]:
    """Have a place raise, in this process."""

    def fail(*_args: Any, **kwargs: Any) -> NoReturn:  # DCP looks for this name
        raise error()

    owner, name = PLACES[place]
    with mock.patch.object(owner, name, fail):
        yield


class Sullen:
    """Something with a state of its own, which raises when it is asked for it or given it, as it is told."""

    def __init__(self) -> None:
        self.value = 0
        self.saving: Callable[[], BaseException] | None = None
        self.loading: Callable[[], BaseException] | None = None

    def state_dict(self) -> dict[str, Any]:
        if self.saving is not None:
            raise self.saving()
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.loading is not None:
            raise self.loading()
        self.value = state["value"]
