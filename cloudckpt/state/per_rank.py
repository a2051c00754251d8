"""Values that each rank has of its own, under one key of the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, Literal, TypeVar, get_args

from cloudckpt.backends.errors import ConfigurationError

T = TypeVar("T")

Policy = Literal["error", "first", "drop"]
OnResize = Policy | Callable[[list[Any], int, int], Any]
"""Policy of a load on another number of ranks than saved."""

DROPPED: Final = object()
"""The result of `resize` where a rank is left without a value: its own stays as it is."""


class PerRank(Generic[T]):
    """A value that differs from rank to rank: each rank saves its own and gets it back.

    Every rank saves one, under the same key. Without it, values that differ under one key are refused, since
    the checkpoint has one value a key.

    Args:
        value: this rank's: a tensor, a plain value, a container of these, or an object with ``state_dict``
            and ``load_state_dict``.
        on_resize: what a load on another number of ranks than saved does. ``"error"`` refuses it.
            ``"first"`` gives every rank the value of rank 0. ``"drop"`` gives ranks that were there their
            value and leaves others as they are. A callable makes a rank's value of all that were saved: it
            gets the list of them, the rank and the number of ranks.

    Attributes:
        value: as given, or as a load left it.
        on_resize: as given.

    Raises:
        ConfigurationError: ``on_resize`` is none of these, or a `PerRank` is put into another.
    """

    __slots__ = ("on_resize", "value")

    def __init__(self, value: T, on_resize: OnResize = "error") -> None:
        if isinstance(value, PerRank):
            raise ConfigurationError("a PerRank holds another PerRank", hint="Put the value into one of them")
        if not callable(on_resize) and on_resize not in get_args(Policy):
            raise ConfigurationError(
                f"on_resize is {on_resize!r}",
                hint="Give 'error', 'first', 'drop', or a function of the list of values, the rank and the "
                "number of ranks",
            )
        self.value = value
        self.on_resize: OnResize = on_resize

    def __repr__(self) -> str:
        return f"PerRank({self.value!r}, on_resize={self.on_resize!r})"


def key_of(key: str, rank: int) -> str:
    """Return the name under which a rank's value is stored."""
    return f"{key}.{rank}"


def needed(saved: int, rank: int, world_size: int, on_resize: OnResize) -> range:
    """Return the ranks whose values `resize` has to be given on this rank, so that no others are read.

    Args:
        saved: number of ranks that saved.
        rank: of this process.
        world_size: number of ranks that load.
        on_resize: policy for another number of ranks.
    """
    if callable(on_resize) and saved != world_size:
        return range(saved)
    if saved != world_size and on_resize == "first":
        return range(min(1, saved))
    if saved != world_size and on_resize == "error":
        return range(0)
    return range(rank, min(rank + 1, saved))


def resize(values: Sequence[Any], rank: int, world_size: int, on_resize: OnResize, *, key: str = "") -> Any:
    """Return the value of a rank, of those that were saved.

    Args:
        values: by the rank that saved them. Those that `needed` leaves out may be anything.
        rank: of this process.
        world_size: number of ranks that load.
        on_resize: policy for another number of ranks.
        key: names the value in an error.

    Returns:
        The value; `DROPPED` where the rank is left without one.

    Raises:
        ConfigurationError: the number of ranks differs, and the policy is ``"error"``.
        Exception: the callable raised it.
    """
    if len(values) == world_size:
        return values[rank]
    if callable(on_resize):
        return on_resize(list(values), rank, world_size)
    if on_resize == "first" and values:
        return values[0]
    if on_resize == "drop":
        return values[rank] if rank < len(values) else DROPPED
    raise ConfigurationError(
        f"{key!r} has a value for each of {len(values)} ranks, and {world_size} load it",
        rank=rank,
        hint="Load it on as many ranks, or say what becomes of it with "
        "PerRank(value, on_resize='first'), 'drop', or a function that reshards",
    )
