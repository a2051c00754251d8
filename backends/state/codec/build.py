"""Build a value from the tree of its pickle, by a closed table of classes.

Every name in the tree is one of four: in the table, an imported Enum, namedtuple or dataclass, on torch's
list of safe globals, or missing. A builder checks what it is given, and runs no method of a class that the
checkpoint chose.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from cloudckpt.backends.state.codec import arrays, builtin_types, tensors
from cloudckpt.backends.state.codec.arguments import Arguments
from cloudckpt.backends.state.codec.classes import (
    find,
    kind_of,
    member_named,
    member_of,
    new_dataclass,
    new_namedtuple,
)
from cloudckpt.backends.state.codec.keys import check_keys
from cloudckpt.backends.state.codec.malformed import MalformedError
from cloudckpt.backends.state.codec.tree import NOTHING, Call, Global, Group, Node, Stored, Table

_BUILDERS: dict[str, Callable[[Arguments], object]] = {
    **builtin_types.BUILDERS,
    **tensors.BUILDERS,
    **arrays.BUILDERS,
}
_NAMED = builtin_types.NAMED | tensors.NAMED | arrays.NAMED
"""Classes that are arguments and no values."""
_LIBRARIES = frozenset({"__main__", "__mp_main__", "cloudckpt", "numpy", "torch"})
"""Modules whose classes are known here or not to be loaded, imported or not."""
_CONTAINERS = (tuple, list, set, frozenset)


class Absent:
    """Instead of an object whose class's module is not imported, where that is no error."""


class MissingClassesError(Exception):
    """Names that a value needs and that are not known here."""

    def __init__(self, missing: Iterable[Global]) -> None:
        self.names = sorted({one.full_name for one in missing})
        self.modules = sorted({one.module for one in missing if _may_be_imported(one)})
        """Modules of the user's that are not imported, and may have an Enum, a namedtuple or a dataclass."""
        super().__init__(*self.names)


def build(root: object, storages: tensors.Storages, *, absent: set[str] | None = None) -> object:
    """Return the value of a tree.

    Args:
        root: the tree.
        storages: where its tensors' memory comes from.
        absent: takes the names of classes whose modules are not imported, and `Absent` their place; without
            it they are missing.

    Raises:
        MissingClassesError: it needs classes that are not known here.
        ChangedClassError: an Enum, namedtuple or dataclass is not as it was.
        MalformedError: no pickler wrote this.
        Exception: what a builder raises for what no pickler wrote.
    """
    allowed = _allowed_by_the_user()
    missing = [one for one in _names_in(root) if not _is_known(one, allowed)]
    if absent is not None:
        absent.update(one.full_name for one in missing if _may_be_imported(one))
        missing = [one for one in missing if one.full_name not in absent]
    if missing:
        raise MissingClassesError(missing)
    return _Building(storages, allowed).run(root)


def _may_be_imported(named: Global) -> bool:
    """Return True if a name may be that of a user's class in a module that is not imported."""
    root = named.module.partition(".")[0]
    known = root in sys.stdlib_module_names or root in _LIBRARIES
    return not known and bool(root) and named.module not in sys.modules


def _names_in(root: object) -> Iterator[Global]:
    seen: set[int] = set()
    left = [root]
    while left:
        part = left.pop()
        if not isinstance(part, Node) or id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Global):
            yield part
        left += part.parts()


def _is_known(named: Global, allowed: dict[str, Any]) -> bool:
    name = named.full_name
    return (
        name in _BUILDERS
        or name in _NAMED
        or name in allowed
        or _constant(named) is not NOTHING
        or kind_of(find(named.module, named.name)) is not None
    )


def _allowed_by_the_user() -> dict[str, Any]:
    """Return what ``torch.serialization.add_safe_globals`` was given, by name."""
    allowed: dict[str, Any] = {}
    for one in torch.serialization.get_safe_globals():
        found: Any = one
        if isinstance(found, tuple):
            allowed[found[1]] = found[0]
        else:
            allowed[f"{found.__module__}.{found.__qualname__}"] = found
    return allowed


def _constant(named: Global) -> Any:
    """Return what a name stands for that is a value itself, such as a dtype or an Enum's member."""
    found = builtin_types.CONSTANTS.get(named.full_name, NOTHING)
    if found is NOTHING:
        found = tensors.constant(named.module, named.name)
    if found is NOTHING and "." in named.name:
        owner, _, member = named.name.rpartition(".")
        cls = find(named.module, owner)
        if kind_of(cls) == "Enum":
            found = member_named(cls, member) or NOTHING
    return found


class _Building:
    """One value on its way."""

    def __init__(self, storages: tensors.Storages, allowed: dict[str, Any]) -> None:
        self._storages = storages
        self._allowed = allowed
        self._made: dict[int, object] = {}
        """By the identity of their nodes, which the root keeps alive."""
        self._named: set[int] = set()
        """Nodes of tuples that hold names: arguments, and no values."""

    def run(self, root: object) -> object:
        started: set[int] = set()
        left = [root]
        while left:
            part = left[-1]
            if not isinstance(part, Node) or id(part) in self._made:
                left.pop()
            elif id(part) in started:
                self._made[id(part)] = self._make(part)
                left.pop()
            else:
                started.add(id(part))
                for one in part.parts():
                    if isinstance(one, Node) and id(one) not in self._made:
                        if id(one) in started:
                            raise MalformedError("it holds itself")
                        left.append(one)
        return self._value(root)

    def _get(self, part: object) -> Any:
        return self._made[id(part)] if isinstance(part, Node) else part

    def _value(self, part: object) -> Any:
        """Return what was made of a part, if that can be a value."""
        value = self._get(part)
        if isinstance(value, Global | tensors.Memory) or id(part) in self._named:
            raise MalformedError("it has a name where a value belongs")
        return value

    def _make(self, node: Node) -> object:
        match node:
            case Global():
                constant = _constant(node)
                if constant is not NOTHING:
                    return constant
                known = node.full_name in _BUILDERS or node.full_name in _NAMED
                return node if known else self._allowed.get(node.full_name, node)
            case Group() if node.kind in _CONTAINERS:
                return self._group(node)
            case Table():
                return _dict(self._pairs(node.items))
            case Stored():
                return self._storages.load(self._get(node.described))
            case Call():
                return self._call(node)
            case _:
                raise MalformedError("it is made of something unknown")

    def _group(self, node: Group) -> object:
        if node.kind is tuple:  # arguments and persistent ids are tuples as well
            made = tuple(map(self._get, node.items))
            if any(isinstance(one, Global | tensors.Memory) for one in made) or any(
                id(one) in self._named for one in node.items
            ):
                self._named.add(id(node))
            return made
        items = list(map(self._value, node.items))
        if node.kind is list:
            return items
        check_keys(items)
        return node.kind(items)

    def _pairs(self, items: list[object]) -> list[tuple[Any, Any]]:
        values = list(map(self._value, items))
        return list(zip(values[::2], values[1::2], strict=True))

    def _call(self, node: Call) -> object:
        named = node.function
        builder = _BUILDERS.get(named.full_name)
        get = self._get if builder is not None else self._value
        arguments = Arguments(
            list(map(get, node.arguments)),
            get(node.state),
            list(map(self._value, node.items)),
            self._pairs(node.pairs),
            new=node.new,
        )
        if builder is not None:
            check_keys([key for key, _ in arguments.pairs])
            return builder(arguments)
        cls: Any = find(named.module, named.name)
        match kind_of(cls):
            case _ if named.full_name in self._allowed:
                return _as_torch_does(self._allowed[named.full_name], arguments)
            case "Enum":
                return member_of(cls, *arguments.bare(1))
            case "namedtuple":
                return new_namedtuple(cls, arguments.only())
            case "dataclass":
                return new_dataclass(cls, arguments.of_new_object())
            case _:
                return Absent()


def _dict(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    check_keys([key for key, _ in pairs])
    return dict(pairs)


def _as_torch_does(made_by: Any, given: Arguments) -> object:
    """Make an object of a class that the user has allowed, as ``torch.load(weights_only=True)`` does.

    The user has said that what this runs may run.
    """
    made: Any = made_by.__new__(made_by, *given.values) if given.new else made_by(*given.values)
    if given.items:
        made.extend(given.items)
    for key, value in given.pairs:
        made[key] = value
    if given.state is NOTHING:
        return made
    if hasattr(made, "__setstate__"):
        made.__setstate__(given.state)
        return made
    state: Any = given.state
    slots: Any = None
    if isinstance(state, tuple) and len(state) == len(("state", "slots")):
        state, slots = state
    made.__dict__.update(state or {})
    for name, value in (slots or {}).items():
        setattr(made, name, value)
    return made
