"""Checkpoints of PyTorch Distributed Checkpoint on object storage: whole or not there at all."""

from cloudckpt.backends.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CommitError,
    ConfigurationError,
    ExecutorDiedError,
    ExecutorError,
    IntegrityError,
    SaveTimeoutError,
    StorageError,
    UnsafeCheckpointError,
)
from cloudckpt.backends.reader import StorageReader
from cloudckpt.backends.version import __version__
from cloudckpt.backends.writer import StorageWriter

__all__ = [
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "CommitError",
    "ConfigurationError",
    "ExecutorDiedError",
    "ExecutorError",
    "IntegrityError",
    "SaveTimeoutError",
    "StorageError",
    "StorageReader",
    "StorageWriter",
    "UnsafeCheckpointError",
    "__version__",
]
