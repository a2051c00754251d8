"""Records of the containers and placements of a state, beside DCP's own metadata.

The records are plain data in the extras of ``.metadata``: a stock reader ignores them. What is read from
there is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, cast

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from cloudckpt.backends.errors import ConfigurationError

EXTRAS = "cloudckpt"
_STATE = "state"

Path = tuple[str | int, ...]
"""The way to a value: text for a mapping's key, as DCP has it, and a number for a list's index."""

Key = str | int | float | bool | bytes | None | tuple[Any, ...]

_PLAIN = frozenset({str, int, float, bool, bytes, type(None)})


def plain_key(key: object, name: str) -> Key:
    """Return a mapping's key as it is recorded.

    Raises:
        ConfigurationError: a key of its class can't be restored.
    """
    if not _is_plain(key):
        raise ConfigurationError(
            f"the mapping at {name!r} has the key {key!r}, whose class {_named(key)} can't be restored",
            hint="Use text, numbers, or tuples of them as keys",
        )
    return cast("Key", key)


def _is_plain(key: object) -> bool:
    return type(key) in _PLAIN or (type(key) is tuple and all(map(_is_plain, key)))


def _named(key: object) -> str:
    return f"{type(key).__module__}.{type(key).__qualname__}"


def is_path(path: object) -> bool:
    """Return whether something that was read is a path."""
    return isinstance(path, tuple) and bool(path) and all(type(part) in (str, int) for part in path)


def name_of(path: Path) -> str:
    """Return the name that DCP gives to what is at a path."""
    return ".".join(map(str, path))


@dataclass(frozen=True, slots=True)
class Container:
    """A container that DCP's names don't describe."""

    path: Path
    kind: str
    keys: tuple[Key, ...] = ()
    """A mapping's keys, in order."""
    factory: str | None = None
    """The name of a defaultdict's factory."""
    length: int = 0
    """Items of a list or tuple, or ranks that stored a value each."""

    def as_plain(self) -> tuple[Any, ...]:
        """Return the record as plain data."""
        return (self.path, self.kind, self.keys, self.factory, self.length)

    @classmethod
    def of_plain(cls, data: object) -> Self | None:
        """Return the record of plain data; None where it is none."""
        if not (isinstance(data, tuple) and len(data) == 5):  # noqa: PLR2004 - the fields
            return None
        path, kind, keys, factory, length = data
        sound = (
            is_path(path)
            and type(kind) is str
            and isinstance(keys, tuple)
            and all(map(_is_plain, keys))
            and (factory is None or type(factory) is str)
            and type(length) is int
            and length >= 0
        )
        return cls(path, kind, keys, factory, length) if sound else None


@dataclass(frozen=True, slots=True)
class Placement:
    """The placement of a DTensor on a mesh of this shape."""

    mesh: tuple[int, ...]
    """Ranks in each dimension of the mesh."""
    names: tuple[str, ...] | None
    """Names of the dimensions."""
    placements: tuple[int | None, ...]
    """For each dimension of the mesh, the tensor's dimension that it shards; None where it replicates."""

    @classmethod
    def of(cls, tensor: Any) -> Self:
        """Return the placement of a tensor; one of a tensor that is none has no dimensions."""
        if not isinstance(tensor, DTensor):
            return cls((), None, ())
        mesh = tensor.device_mesh
        return cls(tuple(mesh.shape), mesh.mesh_dim_names, tuple(map(_sharded_dim, tensor.placements)))

    def as_placements(self) -> list[Shard | Replicate]:
        """Return it as torch has it."""
        return [Replicate() if dim is None else Shard(dim) for dim in self.placements]

    def as_plain(self) -> tuple[Any, ...]:
        """Return the record as plain data."""
        return (self.mesh, self.names, self.placements)

    @classmethod
    def of_plain(cls, data: object) -> Self | None:
        """Return the record of plain data; None where it is none."""
        if not (isinstance(data, tuple) and len(data) == 3):  # noqa: PLR2004 - the fields
            return None
        mesh, names, placements = data
        sound = (
            isinstance(mesh, tuple)
            and all(type(ranks) is int and ranks > 0 for ranks in mesh)
            and isinstance(placements, tuple)
            and len(placements) == len(mesh)
            and all(dim is None or (type(dim) is int and dim >= 0) for dim in placements)
            and (names is None or (isinstance(names, tuple) and len(names) == len(mesh)))
            and all(type(name) is str for name in names or ())
        )
        return cls(mesh, names, placements) if sound else None


def _sharded_dim(placement: object) -> int | None:
    if isinstance(placement, Partial):
        raise ConfigurationError("a tensor is placed as Partial, of which no rank has the value")
    return None if isinstance(placement, Replicate) else cast("Shard", placement).dim


@dataclass(slots=True)
class Records:
    """The records of one checkpoint."""

    containers: dict[str, Container] = field(default_factory=dict)
    placements: dict[str, Placement] = field(default_factory=dict)
    own: dict[str, list[str]] = field(default_factory=dict)
    """Lists of names of which ranks had different ones, as one list."""

    def attach(self, metadata: Metadata) -> None:
        """Put the records into the extras of a checkpoint's metadata."""
        extras = dict(metadata.__dict__.get(EXTRAS) or {})
        extras[_STATE] = {
            "containers": {name: one.as_plain() for name, one in self.containers.items()},
            "placements": {name: one.as_plain() for name, one in self.placements.items()},
            "own": {name: [*names] for name, names in self.own.items()},
        }
        metadata.__dict__[EXTRAS] = extras

    @classmethod
    def of(cls, metadata: Metadata) -> Self | None:
        """Return the records of a checkpoint; None where its writer made none, as DCP's own planner does.

        A record that is not sound is left out.
        """
        extras = metadata.__dict__.get(EXTRAS)
        state = extras.get(_STATE) if isinstance(extras, dict) else None
        if not isinstance(state, dict):
            return None
        own = {
            name: names
            for name, names in _named_of(state, "own").items()
            if isinstance(names, list) and all(type(one) is str for one in names)
        }
        containers = {name: Container.of_plain(data) for name, data in _named_of(state, "containers").items()}
        placements = {name: Placement.of_plain(data) for name, data in _named_of(state, "placements").items()}
        return cls(
            {name: one for name, one in containers.items() if one is not None and name_of(one.path) == name},
            {name: one for name, one in placements.items() if one is not None},
            own,
        )


def _named_of(state: Mapping[Any, Any], what: str) -> dict[str, Any]:
    held = state.get(what)
    if not isinstance(held, dict):
        return {}
    return {name: data for name, data in held.items() if type(name) is str}
