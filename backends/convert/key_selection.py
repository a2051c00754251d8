"""The selection of keys for a conversion, their new names, and the nested state that they make up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cloudckpt.backends.convert.state_source import Path, Source
from cloudckpt.backends.errors import ConfigurationError, IntegrityError


@dataclass(frozen=True, slots=True)
class Selected:
    """An entry of a state that is converted."""

    key: str
    """In the source."""
    name: str
    """Where it goes: the key without its prefix."""
    path: Path
    """Where it is in the nested state there."""


def selected(source: Source, prefix: str = "", strip: str = "") -> list[Selected]:
    """Return the entries whose keys begin with ``prefix``, without the prefix ``strip``.

    Raises:
        ConfigurationError: there are none, or two have one name then.
        IntegrityError: the source says of an entry that it is where none can be.
    """
    keys = [key for key in source.keys if key.startswith(prefix)]
    if prefix and not keys:
        raise ConfigurationError(
            f"no key begins with {prefix!r}",
            uri=source.store.uri,
            hint="`cloudckpt show` shows the keys of a checkpoint",
        )
    found: dict[str, Selected] = {}
    most = len(source.keys)
    for key in keys:
        path = source.paths.get(key, (key,))
        if not _is_path(path, most):
            raise IntegrityError(f"there is no place in a state such as the one given for {key!r}")
        name = key.removeprefix(strip)
        if not name or name in found:
            what = "nothing is left" if not name else f"there are two of {name!r}"
            raise ConfigurationError(f"{what} when {strip!r} is stripped", hint="Strip less, or select fewer")
        found[name] = Selected(key, name, tuple(_stripped(path, strip)) if name != key else tuple(path))
    return [*found.values()]


def nested(places: Iterable[Selected], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state in which each entry's leaf, by its key in the source, is at the entry's path.

    Raises:
        IntegrityError: an entry would be within another.
    """
    root = _Node()
    try:
        for one in places:
            root.add(one.path, leaves[one.key])
        return {str(step): _grown(below) for step, below in root.below.items()}
    except (_NoStateError, RecursionError) as error:
        raise IntegrityError(
            f"the keys do not make up a state: {error}",
            hint="It is damaged; convert another step",
        ) from error


class _NoStateError(Exception):
    """The paths do not describe a dict of dicts and lists."""


@dataclass(slots=True)
class _Node:
    """A dict or a list of a state to be."""

    below: dict[str | int, Any] = field(default_factory=dict)

    def add(self, path: Path, leaf: Any) -> None:
        node = self
        for step in path[:-1]:
            node = node.below.setdefault(step, _Node())
            if not isinstance(node, _Node):
                raise _NoStateError(f"{path} is within another entry")
        if path[-1] in node.below:
            raise _NoStateError(f"{path} is there twice")
        node.below[path[-1]] = _Leaf(leaf)


@dataclass(frozen=True, slots=True)
class _Leaf:
    value: Any


def _grown(node: _Node | _Leaf) -> Any:
    if isinstance(node, _Leaf):
        return node.value
    if all(isinstance(step, str) for step in node.below):
        return {step: _grown(below) for step, below in node.below.items()}
    made: list[Any] = [None] * (1 + max(step for step in node.below if isinstance(step, int)))
    for step, below in node.below.items():
        if not isinstance(step, int):
            raise _NoStateError(f"{step!r} is a key, where others are numbers")
        made[step] = _grown(below)
    return made


def _is_path(path: object, most: int) -> bool:
    """Return True if it can be a path: a list has no more entries than the state has."""
    return (
        isinstance(path, tuple | list)
        and bool(path)
        and isinstance(path[0], str)
        and all(type(step) is str or (type(step) is int and 0 <= step < most) for step in path)
    )


def _stripped(path: Sequence[str | int], strip: str) -> Iterator[str | int]:
    """Yield the steps of the path without the prefix ``strip``, which may end within a step."""
    left = strip
    for at, step in enumerate(path):
        if not left:
            yield from path[at:]
            return
        if left.startswith(f"{step}."):
            left = left[len(str(step)) + 1 :]
        else:
            yield str(step).removeprefix(left)
            left = ""
