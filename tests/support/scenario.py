"""Who meets whom at one checkpoint, in which store, and what may go wrong there."""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from cloudckpt.backends.stores.base import Capabilities, Condition, ObjectInfo, Overwrite
from cloudckpt.backends.stores.memory import MemoryStore
from support.turnstile import Kind

FIRST = "v0"
"""Who saved what is there from the start."""


class Part(enum.Enum):
    """What an actor is there for."""

    CREATES = "creates"
    OVERWRITES = "overwrites"
    READS = "reads"
    DELETES = "deletes"
    COLLECTS = "collects garbage"
    CLEARS = "collects what lives as well"
    PRUNES = "prunes the run"
    SETS_ASIDE = "sets the checkpoint aside"


class Limit(enum.Enum):
    """Where the promises are known to end; a scenario without them finds each of them."""

    OVERTAKEN = "committed, told otherwise, and replaced or deleted before it looked: reports that it lost"
    UNMARKED = "its upload was begun before its marker was there, and gc took it for as old as can be: fails"
    UNNOTICED = "taken for dead by gc right before its commit: lacks its objects until it looks again"


WRITERS = frozenset({Part.CREATES, Part.OVERWRITES})


@dataclass(frozen=True, slots=True)
class Role:
    """An actor before it acts."""

    name: str
    part: Part
    act: Callable[[str], object]
    """Given the checkpoint's URI."""


class IgnorantStore(MemoryStore):
    """Ignores conditions."""

    admits = True
    """It says so."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(conditional_create=not self.admits, conditional_update=not self.admits)

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        return super().put(name, data, Overwrite())


class RemoteStore(MemoryStore):
    """A store whose requests take a round trip, so that those that don't depend on each other go together."""

    @property
    def is_remote(self) -> bool:
        return True


class LaggingStore(MemoryStore):
    """A store whose listings may be minutes old."""

    @property
    def lists_at_once(self) -> bool:
        return False


class LyingStore(IgnorantStore):
    """Ignores conditions, and says that it honours them."""

    admits = False


@dataclass(frozen=True)
class Scenario:
    """Who meets whom, where, and how many faults a run may have."""

    roles: tuple[Role, ...]
    uri: str
    faults: int
    first: Mapping[str, bytes] = field(default_factory=dict)
    """Objects that are there from the start, whole checkpoint or nothing."""
    store: type[MemoryStore] = MemoryStore
    kinds: frozenset[Kind] = frozenset(Kind)
    """Faults of other kinds don't occur."""
    lags: bool = False
    """Listings show what was there up to ten minutes ago, each object at a time of its own."""
    pauses: int = 0
    """How often more time than that may pass in a run, while saves renew their markers."""
    limits: frozenset[Limit] = frozenset()
    """What is put up with."""
    numbers: dict[Hashable, int] = field(default_factory=dict)
    """Histories by number, shared among the runs."""

    def has(self, *parts: Part) -> bool:
        return any(role.part in parts for role in self.roles)
