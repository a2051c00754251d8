"""Classes of a user's, as a state holds their instances, importable in every process of the tests."""

from __future__ import annotations

import collections
import dataclasses
import enum
from typing import Any, NamedTuple

RAN: list[str] = []
"""What has run of the classes that must not run."""

Point = collections.namedtuple("Point", "x y")  # noqa: PYI024  # pyright: ignore[reportUntypedNamedTuple] - such as users have


class Pair(NamedTuple):
    """A typed one."""

    left: Any
    right: Any = None


class Mode(enum.Enum):
    """Values that are numbers, text and tuples."""

    TRAIN = 1
    TEST = "test"
    BOTH = (1, "test")


class Level(enum.IntEnum):
    """A number."""

    HIGH = 2


class Word(enum.StrEnum):
    """A text."""

    A = "a"


class Right(enum.Flag):
    """Bits."""

    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Config:
    """A plain one."""

    rate: Any = 1
    name: Any = None

    class Kind(enum.Enum):
        """A class within a class."""

        SMALL = 1


@dataclasses.dataclass(frozen=True)
class Frozen:
    """One that can't be changed."""

    a: Any = 1


@dataclasses.dataclass(slots=True)
class Slotted:
    """One without a dict."""

    a: Any = 1
    b: Any = 2


@dataclasses.dataclass(slots=True, frozen=True)
class FrozenSlotted:
    """One that dataclasses gives a ``__setstate__``."""

    a: Any = 1
    b: Any = 2


@dataclasses.dataclass
class Watched:
    """One whose making leaves a trace."""

    a: Any = 1

    def __post_init__(self) -> None:
        RAN.append("__post_init__")


@dataclasses.dataclass
class Restoring:
    """One that pickles in a way of its own."""

    a: Any = 1

    def __setstate__(self, state: Any) -> None:
        RAN.append("__setstate__")


class Hashed(enum.Enum):
    """One with a hash of its own."""

    A = 1

    def __hash__(self) -> int:
        RAN.append("__hash__")
        return 1


class Guessing(enum.Enum):
    """One that answers for values that it does not have."""

    A = 1

    @classmethod
    def _missing_(cls, value: object) -> Any:
        RAN.append("_missing_")
        return cls.A


class Plain:
    """One of no kind that is known."""

    def __init__(self) -> None:
        self.a = 1


class MyDict(dict[str, int]):
    """A subclass of a builtin."""


def function() -> None:
    """Leave a trace."""
    RAN.append("function")
