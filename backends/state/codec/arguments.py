"""Arguments that a pickle gives to the making of one object, and checks of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cloudckpt.backends.state.codec.malformed import MalformedError
from cloudckpt.backends.state.codec.tree import NOTHING


@dataclass(slots=True)
class Arguments:
    """Everything that one object is made of."""

    values: list[Any]
    """The arguments of the call."""
    state: Any
    """State that BUILD gives it, or ``NOTHING``."""
    items: list[Any]
    """Items that are appended to it."""
    pairs: list[tuple[Any, Any]]
    """Keys and values that are set in it."""
    new: bool
    """True for `__new__` of a class, false for a call."""

    def only(self) -> list[Any]:
        """Return the arguments, where there is nothing else.

        Raises:
            MalformedError: there is.
        """
        if self.state not in (NOTHING, None) or self.items or self.pairs:
            raise MalformedError("it has more than its class takes")
        return self.values

    def bare(self, *counts: int) -> list[Any]:
        """Return the arguments, where there are as many as one of ``counts`` and nothing else."""
        if len(self.values) not in counts:
            raise MalformedError(f"its class takes {counts} arguments, and is given {len(self.values)}")
        return self.only()

    def of_new_object(self) -> Any:
        """Return the state, where there is no argument."""
        if self.values or self.items or self.pairs or not self.new:
            raise MalformedError("it has more than its class takes")
        return None if self.state is NOTHING else self.state


def checked(value: object, *kinds: type) -> Any:
    """Return a value whose class is exactly one of ``kinds``.

    Raises:
        MalformedError: it is another.
    """
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise MalformedError(f"a {type(value).__name__} is where {names} belongs")
    return value
