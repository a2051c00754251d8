"""One executor, with one checkpoint process, for all Checkpointers of a test module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from cloudckpt import checkpointer
from cloudckpt.executor import ProcessExecutor


class _Shared(ProcessExecutor):
    """An executor that Checkpointers don't close."""

    def close(self, timeout: float | None = None) -> None:
        """Leave the process to the next Checkpointer."""

    def end(self) -> None:
        """Close the executor."""
        super().close()


@contextlib.contextmanager
def one_executor() -> Iterator[ProcessExecutor]:
    """Have every Checkpointer of this process, made inside the block, use the same executor."""
    shared = _Shared(60, 60)

    def given(*_args: Any, **_keywords: Any) -> ProcessExecutor:
        return shared

    with mock.patch.object(checkpointer, "ProcessExecutor", given):
        yield shared
    shared.end()
