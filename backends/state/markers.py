"""Markers inside a described state, for what plain dicts, lists and tensors can't say.

The trainer puts them in, they travel with the snapshot, and `flatten` takes them out again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class CheckpointState(dict[str, Any]):
    """A described state: `Checkpointer` restores it exactly, or refuses it."""

    trust = False
    """True where it will be loaded with ``trust=True``, so that it may hold what else can't be loaded."""
    allowed: tuple[Any, ...] = ()
    """The trainer's additions to the classes that torch loads with ``weights_only=True``."""


class ModuleState(dict[str, Any]):
    """The state of a module by the names of its parameters and buffers.

    A load has the module at hand, so that nothing has to be recorded of its tensors' placements. Ranks may
    hold different names, as the stages of a pipeline do.
    """


class OptimizerState(dict[str, Any]):
    """The state of an optimizer by the names of its parameters, in the layout of DCP."""


@dataclass(frozen=True, slots=True)
class SequenceState:
    """A list or tuple that holds modules, optimizers or other stateful objects, described in order."""

    kind: str
    items: list[Any]


@dataclass(frozen=True, slots=True)
class PerRankState:
    """A value that each rank has its own of."""

    rank: int
    ranks: int
    value: Any


@dataclass(frozen=True, slots=True)
class Rank0Only:
    """A leaf that rank 0 writes: the other ranks' content is not part of the state.

    DistributedDataParallel broadcasts the buffers of rank 0 at each forward pass.
    """

    leaf: Any
    mine: bool
    """True on the rank that writes it."""


@dataclass(frozen=True, slots=True)
class OwnNames:
    """A list of parameters' names, which ranks that own different parameters have different ones of."""

    names: list[str]


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor of an optimizer that is not placed like its parameter: how it is placed is recorded."""

    tensor: Any
