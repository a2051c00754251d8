"""Checkpoints of PyTorch Distributed Checkpoint on object storage: whole or not there at all."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError(
        "cloudckpt needs Linux or macOS, and this is Windows: "
        "run it in the Windows Subsystem for Linux (WSL 2)",
        name="cloudckpt",
    )

if TYPE_CHECKING:
    from cloudckpt.backends.convert.convert import Conversion, convert
    from cloudckpt.backends.copy.copy import Copied, copy_checkpoint
    from cloudckpt.backends.errors import (
        AccessDeniedError,
        CheckpointError,
        CheckpointExistsError,
        CheckpointNotFoundError,
        CommitError,
        ConfigurationError,
        ExecutorDiedError,
        ExecutorError,
        IntegrityError,
        ObjectNotFoundError,
        SaveTimeoutError,
        StorageError,
        UncertainCommitError,
        UnsafeCheckpointError,
    )
    from cloudckpt.backends.load.reader import StorageReader
    from cloudckpt.backends.manage.delete import delete_checkpoint
    from cloudckpt.backends.manage.gc import Garbage, collect_garbage
    from cloudckpt.backends.manage.verify import Damage, Unloadable, Verification, verify
    from cloudckpt.backends.save.writer import StorageWriter
    from cloudckpt.backends.version import __version__
    from cloudckpt.checkpointer import Checkpointer
    from cloudckpt.events import CheckpointInfo
    from cloudckpt.executor import SaveHandle
    from cloudckpt.preemption import Preempted
    from cloudckpt.state.per_rank import PerRank
    from cloudckpt.state.random_state import RandomState

__all__ = [
    "AccessDeniedError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointInfo",
    "CheckpointNotFoundError",
    "Checkpointer",
    "CommitError",
    "ConfigurationError",
    "Conversion",
    "Copied",
    "Damage",
    "ExecutorDiedError",
    "ExecutorError",
    "Garbage",
    "IntegrityError",
    "ObjectNotFoundError",
    "PerRank",
    "Preempted",
    "RandomState",
    "SaveHandle",
    "SaveTimeoutError",
    "StorageError",
    "StorageReader",
    "StorageWriter",
    "UncertainCommitError",
    "Unloadable",
    "UnsafeCheckpointError",
    "Verification",
    "__version__",
    "collect_garbage",
    "convert",
    "copy_checkpoint",
    "delete_checkpoint",
    "verify",
]

# Found when first asked for: torch takes seconds, and the command line's help and completion do without it.
_HOMES = {
    "backends.convert.convert": ("Conversion", "convert"),
    "backends.manage.delete": ("delete_checkpoint",),
    "backends.manage.gc": ("Garbage", "collect_garbage"),
    "backends.load.reader": ("StorageReader",),
    "backends.copy.copy": ("Copied", "copy_checkpoint"),
    "backends.manage.verify": ("Damage", "Unloadable", "Verification", "verify"),
    "backends.version": ("__version__",),
    "backends.save.writer": ("StorageWriter",),
    "checkpointer": ("Checkpointer",),
    "events": ("CheckpointInfo",),
    "executor": ("SaveHandle",),
    "preemption": ("Preempted",),
    "state.per_rank": ("PerRank",),
    "state.random_state": ("RandomState",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # for type checkers every name that is not above is a mistake

    def __getattr__(name: str) -> Any:
        if name in ("backends", "executor"):
            return importlib.import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = _HOME_OF.get(name, "backends.errors")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
