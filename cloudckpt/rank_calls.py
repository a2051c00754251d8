"""Calls of a Checkpointer that all ranks must make alike: compared before a collective of theirs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from cloudckpt.executor import ProcessExecutor
from cloudckpt.executor.coordination.call_comparison import Call
from cloudckpt.executor.coordination.final_step import FinalStep, Notify
from cloudckpt.executor.coordination.rendezvous import grouped
from cloudckpt.rank_broadcast import agreed

T = TypeVar("T")


class Calls:
    """The calls that this rank makes with the others of its group.

    Args:
        executor: through whose store the ranks compare them.
        group: the ranks.
        uri: the run, without options.
    """

    def __init__(self, executor: ProcessExecutor, group: dist.ProcessGroup | None, uri: str) -> None:
        self._executor = executor
        self._group = group
        self._uri = uri

    def meet(self, name: str) -> None:
        """Wait until every rank makes this call. A collective comes after it, and would wait for longer.

        Args:
            name: of the call, with its arguments, such as ``pin(5)``.

        Raises:
            ConfigurationError: another rank makes another call, or has a Checkpointer of another URI.
            ExecutorError: a rank did not come within ``start_timeout``.
        """
        if grouped():
            self._executor.ranks(name, process_group=self._group).meet(Call(name, self._uri))

    def agreed(self, name: str, ask: Callable[[], T]) -> T:
        """Do as `meet`, and then as `ranks.agreed`."""
        self.meet(name)
        return agreed(ask, self._group)

    def confer(self, name: str, ask: Callable[[], bool]) -> bool:
        """Ask on every rank, and return rank 0's answer, or raise what ``ask`` raised on any rank.

        Raises:
            ConfigurationError: another rank makes another call.
            ExecutorError: a rank did not come within ``start_timeout``.
        """
        ranks = self._executor.ranks(name, process_group=self._group, no_dist=not grouped())
        return ranks.confer(Call(name, self._uri), ask)

    def broadcast_bool(self, name: str, about: str) -> Callable[[bool], bool]:
        """Return a function that takes this rank's value and returns rank 0's. Rank 0 does not wait."""

        def follow(value: bool) -> bool:
            ranks = self._executor.ranks(name, process_group=self._group, no_dist=not grouped(), saves=True)
            return ranks.broadcast_bool(Call(name, self._uri, about), value)

        return follow

    def final_step(self, name: str) -> Callable[[Notify], FinalStep]:
        """Return a function that has the ranks agree on the last of the calls that their trainers make."""
        self._executor.check_owner(name)
        return lambda notify: self._executor.ranks(
            name, process_group=self._group, no_dist=not grouped(), saves=True
        ).final_step(notify)


def spelled(value: Any) -> str:
    """Spell an argument of a call, a whole number of any type alike."""
    try:
        return str(operator.index(value))
    except TypeError:
        return repr(value)
