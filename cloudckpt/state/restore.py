"""Restoring a state: which tensors and values of a checkpoint are read, and into what.

The checkpoint decides the shape of dicts and lists and the values in them. The state decides which tensors
are read, and gives those that it has to be read into.
"""

from __future__ import annotations

import collections
import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, empty

from cloudckpt.backends.errors import ConfigurationError, IntegrityError
from cloudckpt.backends.state import placements
from cloudckpt.backends.state.flatten import FACTORIES, MAPPINGS
from cloudckpt.backends.state.load_planner import Targets
from cloudckpt.backends.state.records import Container, Placement
from cloudckpt.backends.state.tree import SavedTree
from cloudckpt.backends.torch_private import ShardedTensor
from cloudckpt.state.live import is_live, is_meta, joined

Loaded = Mapping[str, Any]
Build = Callable[[Loaded], Any]
"""Makes what is restored of what was loaded, by name."""

NOTHING = object()
"""Stands for a place of the state that has nothing yet."""

_KINDS: dict[str, type] = {name: kind for kind, name in reversed(MAPPINGS.items())}  # dict comes last
_SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple}
_FACTORIES = {name: factory for factory, name in FACTORIES.items()}


@dataclass(slots=True)
class Restorer:
    """Chooses what to read of one checkpoint.

    Args:
        tree: of the checkpoint.
        meshes: device meshes of the state's own tensors.
        visit: restores a live object of a name, such as a module.
    """

    tree: SavedTree
    meshes: list[DeviceMesh]
    visit: Callable[[Restorer, str, Any], Build]
    targets: Targets = field(default_factory=Targets)
    missing: list[str] = field(default_factory=list)
    """Names that the state asks for and the checkpoint does not have."""
    ignored: set[str] = field(default_factory=set)
    """Names that the state leaves out on purpose."""

    def restore(
        self,
        name: str,
        template: Any,
        *,
        stateful: bool = False,
        blank: Callable[[str, TensorStorageMetadata], torch.Tensor] | None = None,
    ) -> Build:
        """Restore what is saved under a name.

        Args:
            name: of the place, in the state and in the checkpoint.
            template: what the state has there.
            stateful: the template is what an object's ``state_dict()`` returned. What is restored goes to its
                ``load_state_dict()``, which is to get all that was saved.
            blank: makes a tensor to read into where the template has none.

        Raises:
            ConfigurationError: what the state has there and what was saved don't fit.
        """
        if is_live(template):
            return self.visit(self, name, template)
        if name in self.tree.entries:
            return self._leaf(name, template, stateful=stateful, blank=blank)
        children = self.tree.children(name)
        record = self.tree.container(name)
        if not children and record is None:
            return self._absent(name, template)
        if record is not None and record.kind == "per_rank":
            raise ConfigurationError(
                f"the checkpoint has a value of each rank at {name!r}, and the state a "
                f"{type(template).__name__}",
                hint="Put a cloudckpt.PerRank there",
            )
        if isinstance(template, torch.Tensor):
            raise ConfigurationError(
                f"the state has a tensor at {name!r}, and the checkpoint a container",
                hint="Build the state that was saved",
            )
        made = _Container(self, name, template, record, children, stateful=stateful, blank=blank)
        return made.build()

    def read(self, name: str, target: torch.Tensor | None) -> Build:
        """Read a leaf: into a tensor, or as a value."""
        self.targets.tensors[name] = target
        return lambda loaded: loaded[name]

    def _leaf(
        self,
        name: str,
        template: Any,
        *,
        stateful: bool,
        blank: Callable[[str, TensorStorageMetadata], torch.Tensor] | None,
    ) -> Build:
        entry = self.tree.entries[name]
        if not isinstance(entry, TensorStorageMetadata):
            return self.read(name, None)
        if isinstance(template, torch.Tensor) and not (stateful and _differs(template, entry)):
            self.ensure_fits(name, template, entry)
            return self.read(name, template)
        self.targets.blank.add(name)
        if blank is not None:
            return self.read(name, blank(name, entry))
        device = template.device if isinstance(template, torch.Tensor) else None
        return self.read(name, self.blank(name, entry, device))

    def ensure_fits(self, name: str, target: torch.Tensor, entry: TensorStorageMetadata) -> None:
        """Ensure that a tensor can be read into another.

        Raises:
            ConfigurationError: it has no data, or another shape.
        """
        if is_meta(target):
            raise ConfigurationError(
                f"the tensor at {name!r} is on the meta device, and can't be loaded into",
                hint="Materialize it, as with torch.empty_like(tensor, device=…)",
            )
        shards = placements.shard_attributes(target)
        size = tuple(target.shape if shards is None else shards.global_shape)
        if size != tuple(entry.size):
            raise ConfigurationError(
                f"the tensor {name!r} has size {size} in the state and {tuple(entry.size)} in the checkpoint",
                hint="Build the state that was saved, or leave this tensor out of it",
            )

    def blank(
        self, name: str, entry: TensorStorageMetadata, device: torch.device | None = None
    ) -> torch.Tensor:
        """Make a tensor to read into, placed as the checkpoint says.

        Raises:
            ConfigurationError: it was placed on a mesh, and the state has none like it.
            IntegrityError: no machine like this one can have held it.
        """
        placement = self.tree.records.placements.get(name)
        dtype = entry.properties.dtype
        if placement is None or not placement.mesh:
            nbytes = math.prod(entry.size) * dtype.itemsize
            if nbytes > psutil.virtual_memory().total:
                raise IntegrityError(
                    f"{name!r} claims to be a tensor of {nbytes:,} bytes, more than this machine's memory",
                    hint="Give the state a tensor to load into, or load another step",
                )
            layout = entry.properties.layout
            return torch.empty(tuple(entry.size), dtype=dtype, device=device, layout=layout)
        mesh = self._mesh_for(name, placement)
        return empty(*entry.size, dtype=dtype, device_mesh=mesh, placements=placement.as_placements())

    def _mesh_for(self, name: str, placement: Placement) -> DeviceMesh:
        def closeness(mesh: DeviceMesh) -> tuple[bool, bool]:
            return tuple(mesh.shape) == placement.mesh, mesh.mesh_dim_names == placement.names

        fitting = [mesh for mesh in self.meshes if mesh.ndim == len(placement.mesh)]
        if not fitting:
            raise ConfigurationError(
                f"{name!r} was saved as a DTensor on a mesh of shape {placement.mesh}, and no tensor of the "
                "state is on a mesh of so many dimensions",
                hint="Put a DTensor there to load into, or its model into the state",
            )
        return max(fitting, key=closeness)

    def _absent(self, name: str, template: Any) -> Build:
        if self.tree.is_complete or not is_empty(template):
            self.missing += [*names_in(template, name)] or [name]
        return lambda _loaded: template

    def raise_missing(self) -> None:
        """Raise an error that names what is missing.

        Raises:
            ConfigurationError: something is.
        """
        if not self.missing:
            return
        there = [*self.tree.entries]
        first = self.missing[0]
        near = difflib.get_close_matches(first, there, n=3, cutoff=0.6) or there[:3]
        named = ", ".join(map(repr, near)) + (", …" if len(there) > len(near) else "")
        more = f" and {len(self.missing) - 1:,} more" if len(self.missing) > 1 else ""
        raise ConfigurationError(
            f"the state asks for {first!r}{more}, which the checkpoint does not have",
            hint=f"It has {named}. Build the state that was saved, or leave out what is not there",
        )


@dataclass(slots=True)
class _Container:
    """A container to restore, over what the state has in its place."""

    restorer: Restorer
    name: str
    template: Any
    record: Container | None
    children: Mapping[str | int, str]
    stateful: bool
    blank: Callable[[str, TensorStorageMetadata], torch.Tensor] | None

    def build(self) -> Build:
        """Choose what to read, and return what makes the container of it."""
        if self.record is not None and self.record.kind in _SEQUENCES:
            return self._items(_SEQUENCES[self.record.kind], self.record.length)
        if self.record is None and self.children and all(type(part) is int for part in self.children):
            return self._items(list, max(part for part in self.children if isinstance(part, int)) + 1)
        return self._mapping()

    def _items(self, kind: type, length: int) -> Build:
        held = self.template if isinstance(self.template, list | tuple) else ()
        builds = [
            self._restore(self.children.get(index, joined(self.name, index)), template)
            for index, template in zip(
                range(length), [*held[:length], *[NOTHING] * (length - len(held))], strict=True
            )
        ]
        for index, extra in enumerate(held[length:], length):
            if holds_tensors(extra):
                self.restorer.missing += names_in(extra, joined(self.name, index))

        def build(loaded: Loaded) -> Any:
            items = [one(loaded) for one in builds]
            if type(self.template) is list and kind is list:
                self.template[:] = items
                return self.template
            same = type(self.template) is kind and len(items) == len(held)
            if same and all(a is b for a, b in zip(items, held, strict=True)):
                return self.template
            return kind(items)

        return build

    def _mapping(self) -> Build:
        template = self.template if isinstance(self.template, Mapping) else {}
        saved = self._saved(template)
        kind = self.record.kind if self.record is not None else self._kind()
        builds: dict[Any, Build] = {}
        for key, child in saved.items():
            if key in template:
                builds[key] = self._restore(child, template[key])
            elif not self._is_unasked(template, child):
                builds[key] = self._restore(child, NOTHING)
        for key in template.keys() - saved.keys():
            self._lacks(template[key], joined(self.name, key), empty=not saved)
        factory = self.record.factory if self.record is not None else None

        def build(loaded: Loaded) -> Any:
            items = {key: one(loaded) for key, one in builds.items()}
            return _filled(self.template, kind, items, factory)

        return build

    def _restore(self, name: str, template: Any) -> Build:
        return self.restorer.restore(name, template, stateful=self.stateful, blank=self.blank)

    def _saved(self, template: Mapping[Any, Any]) -> dict[Any, str]:
        """Return the names of what was saved, by the keys that it had, in order."""
        if self.record is not None:
            keys: Iterable[Any] = self.record.keys
            saved = {key: self.children.get(str(key), joined(self.name, key)) for key in keys}
            taken = set(saved.values())
        else:
            saved, taken = {}, set()
        own = {} if self.restorer.tree.is_complete else {str(key): key for key in template}
        for part, child in self.children.items():
            if child not in taken:
                saved[own.get(str(part), part)] = child
        return saved

    def _kind(self) -> str:
        """Return the kind of a mapping that nothing is recorded of: the template's, in what others wrote."""
        if self.restorer.tree.is_complete:
            return "dict"
        return MAPPINGS.get(type(self.template), "dict")

    def _is_unasked(self, template: Mapping[Any, Any], child: str) -> bool:
        """Return whether a tensor was saved beside those that the state asks for, without being one of them.

        A state that has some of a mapping's tensors asks for these. One that has none asks for all.
        """
        if not self.restorer.tree.holds_tensors(child):
            return False
        if self.stateful:
            is_tensor = child in self.restorer.tree.entries
            return is_tensor and any(isinstance(value, torch.Tensor) for value in template.values())
        return holds_tensors(template)

    def _lacks(self, value: Any, name: str, *, empty: bool) -> None:
        """Note what the state has and the checkpoint lacks, but for values whose owner can do without."""
        if holds_tensors(value) or not (empty or self.stateful):
            self.restorer.missing += [*names_in(value, name)] or [name]


def _differs(template: torch.Tensor, entry: TensorStorageMetadata) -> bool:
    """Return whether an object's own tensor is not like the one that was saved, so that it gets a new one."""
    known = isinstance(template, DTensor | ShardedTensor) or placements.shard_attributes(template)
    if known or template.is_meta:
        return False
    return tuple(template.shape) != tuple(entry.size) or template.dtype != entry.properties.dtype


def holds_tensors(value: Any) -> bool:
    """Return whether there is a tensor or a live object in a value."""
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, Mapping):
        return any(map(holds_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_tensors, value))
    return is_live(value)


def is_empty(value: Any) -> bool:
    """Return whether there is no leaf in a value."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return type(value) is list and bool(value) and all(map(is_empty, value))


def names_in(value: Any, name: str) -> Iterator[str]:
    """Yield the names of a value's leaves."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from names_in(inner, joined(name, key))
    elif isinstance(value, list) and any(isinstance(one, torch.Tensor | Mapping | list) for one in value):
        for index, inner in enumerate(value):
            yield from names_in(inner, joined(name, index))
    else:
        yield name


def _filled(template: Any, kind: str, items: dict[Any, Any], factory: str | None) -> Any:
    """Return a mapping of a kind with these items: the state's own where it is one."""
    if isinstance(template, MutableMapping) and (
        type(template) not in MAPPINGS or MAPPINGS[type(template)] == kind
    ):
        target: Any = template
        if type(template) in MAPPINGS:
            target.clear()
    else:
        target = _KINDS.get(kind, dict)()
    if factory is not None and isinstance(target, collections.defaultdict):
        target.default_factory = _FACTORIES.get(factory)
    for key, value in items.items():
        target[key] = value
    return target
