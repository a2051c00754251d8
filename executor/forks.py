"""Forked processes: the owner of an executor, errors in its forked children, and inherited process groups.

A forked child has a copy of everything but the threads: an executor without its supervisor would wait for
ever, and a store's connection that both use would mix their requests up.
"""

from __future__ import annotations

import os
from typing import Any, Final, NoReturn

import torch.distributed as dist

from cloudckpt.backends.errors import ExecutorError

CURE: Final = "Make a Checkpointer or ProcessExecutor in this process, or use it in the process that made it"


class Owner:
    """The process that made an object, the only one that may use it.

    Args:
        what: the object, as errors name it.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._pid = os.getpid()

    @property
    def is_elsewhere(self) -> bool:
        """True in a process that was forked from the owner."""
        return os.getpid() != self._pid

    def check(self, call: str) -> None:
        """Make sure that this process is the owner.

        Args:
            call: made by this process, such as ``save(5)``.

        Raises:
            ExecutorError: this process was forked from the owner.
        """
        if self.is_elsewhere:
            raise ExecutorError(
                f"{call} was called in process {os.getpid()}, which was forked from process {self._pid}, "
                f"and {self._what} belongs to process {self._pid}: its threads work only there",
                hint=CURE,
            )


class Unpicklable:
    """A base class of objects that can't be sent to another process, which says so."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ExecutorError(
            f"a {type(self).__name__} can't be pickled, copied or sent to another process: it belongs to "
            f"process {os.getpid()}",
            hint="Send its URI, and make a Checkpointer or ProcessExecutor in the other process",
        )


def has_own_group() -> bool:
    """Return True if this process has a default process group that it did not inherit by a fork.

    A forked child is no rank: the connections of an inherited group belong to its parent.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return not any(group is dist.group.WORLD for group in _inherited)


_inherited: Final[list[object]] = []


def _inherit() -> None:
    if dist.is_available() and dist.is_initialized():
        _inherited[:] = [dist.group.WORLD]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_inherit)
