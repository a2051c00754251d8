"""Flattening a described state to the names that DCP gives, with a record of what DCP's names lose.

DCP joins the keys of nested dicts and the indices of lists with dots. The names alone do not
tell an int key from its text, a Counter from a dict, or that there was an empty dict.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.state import markers
from cloudckpt.backends.state.records import Container, Path, Placement, plain_key

MAPPINGS: dict[type, str] = {
    dict: "dict",
    collections.OrderedDict: "OrderedDict",
    collections.defaultdict: "defaultdict",
    collections.Counter: "Counter",
    markers.CheckpointState: "dict",
    markers.ModuleState: "dict",
    markers.OptimizerState: "dict",
}
"""The classes of mappings that are restored, by the name of what they are restored as."""

FACTORIES: dict[Any, str] = {
    None: "",
    **{kind: kind.__name__ for kind in (int, float, complex, bool, str, bytes, list, dict, set, tuple)},
    collections.Counter: "Counter",
    collections.OrderedDict: "OrderedDict",
}
"""The factories of a defaultdict that are restored, by name."""


def refused(value: object, name: str, instead: str, of: str = "") -> ConfigurationError:
    """Return the error for a container of a class that can't be restored.

    Args:
        value: the container.
        name: of its place.
        instead: class to save instead.
        of: says what it holds, where that is why.
    """
    kind = type(value)
    return ConfigurationError(
        f"the container at {name!r} is a {kind.__module__}.{kind.__qualname__}{of}, which can't be restored",
        hint=f"Make a {instead} of it",
    )


def kind_of(value: Mapping[Any, Any], name: str) -> str:
    """Return what a mapping is restored as.

    Raises:
        ConfigurationError: it is of a class that can't be restored.
    """
    if (kind := MAPPINGS.get(type(value))) is None:
        raise refused(value, name, "dict")
    return kind


def factory_of(value: Mapping[Any, Any], name: str) -> str | None:
    """Return the name of a defaultdict's factory; None for other mappings.

    Raises:
        ConfigurationError: it is a factory that can't be restored.
    """
    if not isinstance(value, collections.defaultdict):
        return None
    if (factory := FACTORIES.get(value.default_factory)) is None:
        raise ConfigurationError(
            f"the defaultdict at {name!r} has the factory {value.default_factory!r}, which can't be restored",
            hint="Make a dict of it, or give it one of Python's own types, such as list or int",
        )
    return factory


@dataclass(slots=True)
class Flat:
    """A flattened state."""

    leaves: dict[str, Any] = field(default_factory=dict)
    """Tensors and values by name."""
    paths: dict[str, Path] = field(default_factory=dict)
    """The path of each leaf."""
    containers: dict[str, Container] = field(default_factory=dict)
    placements: dict[str, Placement] = field(default_factory=dict)
    foreign: set[str] = field(default_factory=set)
    """Leaves that another rank writes."""
    rank0: set[str] = field(default_factory=set)
    """Leaves that rank 0 writes, regardless of the others' values."""
    own: dict[str, list[str]] = field(default_factory=dict)
    """Lists of names that ranks may have different ones of."""
    keys: dict[str, str] = field(default_factory=dict)
    """A text of the keys of each mapping that holds values alone, which must be alike on all ranks."""

    def common(self) -> dict[str, Any]:
        """Return what ranks that have it must have alike: leaves, and the keys of mappings of values."""
        apart = self.rank0 | self.own.keys()
        return {**self.keys, **{name: leaf for name, leaf in self.leaves.items() if name not in apart}}

    def structure(self) -> object:
        """Return what a plan depends on, beside the leaves."""
        return self.containers, self.placements, sorted(self.foreign), self.own


def flatten(state: Mapping[str, Any]) -> Flat:
    """Flatten a described state.

    Raises:
        ConfigurationError: two paths have one name, or a container can't be restored.
    """
    flat = Flat()
    _Walk(flat).mapping((), "", state)
    return flat


def is_leaf_list(value: list[Any]) -> bool:
    """Return whether DCP stores a list whole: one without tensors, mappings and lists of these."""
    return not any(map(_opens, value))


def _opens(value: object) -> bool:
    if isinstance(value, list):
        return not is_leaf_list(value)
    return isinstance(value, _OPENED)


_OPENED = (
    Mapping,
    torch.Tensor,
    markers.SequenceState,
    markers.PerRankState,
    markers.Rank0Only,
    markers.Placed,
)


_TENSORS, _LEAVES = 1, 2
"""Flags of a value that holds tensors, and of one that holds leaves of any kind."""


class _Walk:
    def __init__(self, flat: Flat) -> None:
        self._flat = flat
        self._module = 0
        """Depth of modules' and optimizers' states around what is walked."""

    def value(self, path: Path, name: str, value: Any) -> int:
        """Walk one value; return what is in it."""
        if isinstance(value, torch.Tensor):
            self._leaf(path, name, value)
            if isinstance(value, DTensor) and not self._module:
                self._flat.placements[name] = Placement.of(value)
            return _TENSORS | _LEAVES
        if isinstance(value, Mapping):
            return self.mapping(path, name, value)
        if isinstance(value, list) and not is_leaf_list(value):
            return self._items(path, name, value)
        match value:
            case markers.SequenceState(kind, items):
                self._record(name, Container(path, kind, length=len(items)))
                return self._items(path, name, items)
            case markers.PerRankState(rank, ranks, inner):
                self._record(name, Container(path, "per_rank", length=ranks))
                return self.value((*path, str(rank)), f"{name}.{rank}", inner)
            case markers.Rank0Only(leaf, mine):
                self._flat.rank0.add(name)
                if not mine:
                    self._flat.foreign.add(name)
                return self.value(path, name, leaf)
            case markers.Placed(tensor):
                self._flat.placements[name] = Placement.of(tensor)
                self._leaf(path, name, tensor)
                return _TENSORS | _LEAVES
            case markers.OwnNames(names):
                self._flat.own[name] = names
                self._leaf(path, name, names)
                return _LEAVES
            case _:
                self._leaf(path, name, value)
                return _LEAVES

    def mapping(self, path: Path, name: str, value: Mapping[Any, Any]) -> int:
        known = isinstance(value, markers.ModuleState | markers.OptimizerState)
        self._module += known
        prefix = f"{name}." if path else ""
        whole, hollow = 0, not value
        for key, inner in value.items():
            if type(key) is str:
                text = key
            elif (text := str(key)) in value:
                raise ConfigurationError(
                    f"two values of the state have the name {prefix + text!r}: the mapping has the keys "
                    f"{key!r} and {text!r}",
                    hint="DCP names values by the text of their keys. Rename one of the keys",
                )
            found = self.value((*path, text), prefix + text, inner)
            whole |= found
            hollow |= not found
        self._module -= known
        if path:
            self._recorded(path, name, value, plain=not hollow)
            if not (whole & _TENSORS or known or self._module):
                self._flat.keys[name] = repr([*value])
        return whole

    def _recorded(self, path: Path, name: str, value: Mapping[Any, Any], *, plain: bool) -> None:
        """Record a mapping, unless its names say all of it: DCP has none for what holds no leaf."""
        kind = kind_of(value, name)
        if plain and kind == "dict" and all(type(key) is str for key in value):
            return
        keys = tuple(plain_key(key, name) for key in value)
        self._record(name, Container(path, kind, keys=keys, factory=factory_of(value, name)))

    def _items(self, path: Path, name: str, items: list[Any]) -> int:
        whole = 0
        for index, inner in enumerate(items):
            whole |= self.value((*path, index), f"{name}.{index}", inner)
        return whole

    def _record(self, name: str, container: Container) -> None:
        self._ensure_new(container.path, name)
        self._flat.containers[name] = container

    def _leaf(self, path: Path, name: str, value: Any) -> None:
        self._ensure_new(path, name)
        self._flat.leaves[name] = value
        self._flat.paths[name] = path

    def _ensure_new(self, path: Path, name: str) -> None:
        there = self._flat.paths.get(name)
        if there is None and (container := self._flat.containers.get(name)) is not None:
            there = container.path
        if there is not None:
            raise ConfigurationError(
                f"two values of the state have the name {name!r}: one at {shown(there)} and one at "
                f"{shown(path)}",
                hint="DCP joins keys with dots, and writes numbers as text. Rename one of the keys",
            )


def shown(path: Path) -> str:
    """Return a path as Python has it, such as ``['a'][0]``."""
    return "".join(f"[{part!r}]" for part in path)
