"""Events of a run's checkpoints, with types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checkpoint that was committed.

    Attributes:
        step: its number.
        uri: where it is.
        size: bytes of its data objects, of all ranks.
        objects: how many there are.
        seconds: from the call that saved it until it was known to be committed.
        committed_at: when that was, by this machine's clock.
    """

    step: int
    uri: str
    size: int
    objects: int
    seconds: float
    committed_at: datetime


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a step on this rank.

    Attributes:
        step: which.
        uri: where its checkpoint is, or would be.
        rank: of this process.
    """

    step: int
    uri: str
    rank: int


@dataclass(frozen=True, slots=True)
class Staged(Event):
    """The state has been copied and may change; training was blocked for so many ``seconds``."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Planned(Event):
    """It is known what this rank stores: so many bytes (``size``)."""

    size: int


@dataclass(frozen=True, slots=True)
class Uploaded(Event):
    """This rank's bytes (``size``) are stored, and invisible until the commit."""

    size: int


@dataclass(frozen=True, slots=True)
class Committed(Event):
    """The step is there, on every rank and for everyone."""

    info: CheckpointInfo


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """The save failed, on every rank, with ``error``."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Pruned(Event):
    """The save of this step has let older ``steps`` go."""

    steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Loaded(Event):
    """The state is that of this step; it took so many ``seconds``.

    Attributes:
        seconds: from the start of the load to its end on every rank.
        size: bytes of the checkpoint's data objects, also where only some of them were read.
        instead_of: the newest step, where another was loaded because that one can't be.
    """

    seconds: float
    size: int = 0
    instead_of: int | None = None


OnEvent = Callable[[Event], object]
"""Called on a thread of the Checkpointer's, with one event after another; must not take long."""
