"""Checkpoints of PyTorch Distributed Checkpoint on object storage: whole or not there at all."""

from cloudckpt.backends.delete import delete_checkpoint
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
from cloudckpt.backends.gc import Garbage, collect_garbage
from cloudckpt.backends.reader import StorageReader
from cloudckpt.backends.verify import Damage, Verification, verify
from cloudckpt.backends.version import __version__
from cloudckpt.backends.writer import StorageWriter
from cloudckpt.checkpointer import Checkpointer
from cloudckpt.events import CheckpointInfo
from cloudckpt.executor import SaveHandle

__all__ = [
    "AccessDeniedError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointInfo",
    "CheckpointNotFoundError",
    "Checkpointer",
    "CommitError",
    "ConfigurationError",
    "Damage",
    "ExecutorDiedError",
    "ExecutorError",
    "Garbage",
    "IntegrityError",
    "ObjectNotFoundError",
    "SaveHandle",
    "SaveTimeoutError",
    "StorageError",
    "StorageReader",
    "StorageWriter",
    "UncertainCommitError",
    "UnsafeCheckpointError",
    "Verification",
    "__version__",
    "collect_garbage",
    "delete_checkpoint",
    "verify",
]
