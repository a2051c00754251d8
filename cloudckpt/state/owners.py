"""Owners of state: each asks an object for its state, describes it, and gives back what was loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.state.markers import PerRankState
from cloudckpt.state import fsdp1, live, modules, optimizers
from cloudckpt.state.live import joined
from cloudckpt.state.per_rank import DROPPED, PerRank, needed, resize
from cloudckpt.state.restore import NOTHING, Build, Loaded, Restorer

if TYPE_CHECKING:
    from cloudckpt.state.describe import Describer

Apply = Callable[[Loaded], None]


class Owner(ABC):
    """A live object of a state."""

    turn = 0
    """When it gets its state back: optimizers after their models."""

    @abstractmethod
    def ask(self) -> None:
        """Ask the object for the state that it has now."""

    @abstractmethod
    def describe(self, describer: Describer, name: str) -> Any:
        """Return the state that it had when it was asked, for a save under a name."""

    @abstractmethod
    def restore(self, restorer: Restorer, name: str) -> Apply:
        """Choose what to read of a checkpoint; return what gives it to the object."""


@dataclass(slots=True)
class Owners:
    """The owners of all live objects of a state."""

    rank: int
    ranks: int
    _owners: dict[int, Owner] = field(default_factory=dict)

    @classmethod
    def of(cls, state: Mapping[str, Any], rank: int, ranks: int) -> Owners:
        """Find the live objects of a state.

        Args:
            state: the state.
            rank: this rank.
            ranks: how many there are.
        """
        owners = cls(rank, ranks)
        found = [*live.find(state)]
        candidates = [one.value for one in found if live.is_module(one.value)]
        for one in found:
            owners._owners[id(one.value)] = owners._owner(one.name, one.value, candidates)
        return owners

    def ask(self) -> None:
        """Ask each object for its state, in the same order on all ranks."""
        for owner in self._owners.values():
            owner.ask()

    def __getitem__(self, value: object) -> Owner:
        """Return the owner of a live object."""
        return self._owners[id(value)]

    def _owner(self, name: str, value: Any, candidates: Sequence[nn.Module]) -> Owner:
        if live.is_module(value):
            return ModuleOwner(name, value)
        if live.is_optimizer(value):
            return OptimizerOwner(name, value, candidates)
        if isinstance(value, PerRank):
            return PerRankOwner(value, self)
        return StatefulOwner(value)


@dataclass(slots=True)
class StatefulOwner(Owner):
    """An object with ``state_dict`` and ``load_state_dict``."""

    value: Any
    _state: Any = None

    def ask(self) -> None:
        self._state = self.value.state_dict()

    def describe(self, describer: Describer, name: str) -> Any:
        return describer.value(self._state, name)

    def restore(self, restorer: Restorer, name: str) -> Apply:
        build = restorer.restore(name, self._state, stateful=True)
        return lambda loaded: self.value.load_state_dict(build(loaded))


@dataclass(slots=True)
class ModuleOwner(Owner):
    """A module."""

    turn = 1
    name: str
    module: nn.Module
    _state: dict[str, Any] = field(default_factory=dict)

    def ask(self) -> None:
        self._state = modules.describe(self.module, self.name)

    def describe(self, describer: Describer, name: str) -> Any:
        return describer.module(self._state, name)

    def restore(self, restorer: Restorer, name: str) -> Apply:
        builds: dict[str, Build] = {}
        for fqn, value in modules.unmarked(self._state).items():
            inner = joined(name, fqn)
            if not restorer.tree.has(inner):
                restorer.missing.append(inner)
            elif isinstance(value, torch.Tensor):
                builds[fqn] = restorer.restore(inner, value)
            else:
                builds[fqn] = restorer.restore(inner, value, stateful=True)

        def apply(loaded: Loaded) -> None:
            modules.restore(self.module, {fqn: build(loaded) for fqn, build in builds.items()})

        return apply


@dataclass(slots=True)
class OptimizerOwner(Owner):
    """An optimizer."""

    turn = 2
    name: str
    optimizer: Optimizer
    candidates: Sequence[nn.Module]
    _owned: optimizers.NamedOptimizer | None = None
    _state: Any = None

    def ask(self) -> None:
        self._state = self.optimizer.state_dict()
        self._owned = None
        if optimizers.is_standard(self._state):
            module = optimizers.module_of(self.name, self.optimizer, self.candidates)
            kind = fsdp1.ShardedOptimizer if fsdp1.is_wrapped(module) else optimizers.NamedOptimizer
            self._owned = kind(self.name, self.optimizer, module, self._state)
            self._owned.ask()

    def describe(self, describer: Describer, name: str) -> Any:
        state = self._state if self._owned is None else self._owned.describe()
        return describer.value(state, name)

    def restore(self, restorer: Restorer, name: str) -> Apply:
        owned = self._owned
        if owned is None:
            build = restorer.restore(name, self._state, stateful=True)
            return lambda loaded: self.optimizer.load_state_dict(build(loaded))
        tree = restorer.tree
        groups_name = f"{name}.param_groups"
        if not tree.has(groups_name):
            restorer.missing.append(groups_name)
            return lambda _loaded: None
        groups = restorer.restore(groups_name, NOTHING, stateful=True)
        states: dict[Any, dict[str, Build]] = {}
        for key, aliases in owned.names():
            for alias in aliases:
                children = tree.children(f"{name}.state.{alias}")
                if not children and tree.container(f"{name}.state.{alias}") is None:
                    continue
                states[key] = {
                    str(part): restorer.restore(
                        child, NOTHING, blank=_blank_for(restorer, owned, key, str(part))
                    )
                    for part, child in children.items()
                }
                break

        def apply(loaded: Loaded) -> None:
            saved = optimizers.checked(groups(loaded), groups_name)
            own = tree.records.own
            lists = [
                own.get(f"{groups_name}.{index}.params") or group["params"]
                for index, group in enumerate(saved)
            ]
            state = {
                key: {part: build(loaded) for part, build in held.items()} for key, held in states.items()
            }
            owned.restore(state, saved, lists, complete=tree.is_complete)

        return apply


def _blank_for(
    restorer: Restorer, owned: optimizers.NamedOptimizer, key: Any, part: str
) -> Callable[[str, TensorStorageMetadata], torch.Tensor]:
    def blank(name: str, entry: TensorStorageMetadata) -> torch.Tensor:
        if name not in restorer.tree.records.placements:
            made = owned.blank(key, part, entry)
            if made is not None:
                return made
        return restorer.blank(name, entry)

    return blank


@dataclass(slots=True)
class PerRankOwner(Owner):
    """A value that each rank has its own of."""

    per_rank: PerRank[Any]
    owners: Owners

    def ask(self) -> None:
        """Nothing to ask: what is in it is asked itself."""

    def describe(self, describer: Describer, name: str) -> Any:
        rank = self.owners.rank
        return PerRankState(rank, self.owners.ranks, describer.value(self.per_rank.value, joined(name, rank)))

    def restore(self, restorer: Restorer, name: str) -> Apply:
        tree, rank, ranks = restorer.tree, self.owners.rank, self.owners.ranks
        record = tree.container(name)
        if record is not None and record.kind == "per_rank":
            names = [joined(name, one) for one in range(record.length)]
        elif tree.has(name):
            names = [name]
        else:
            restorer.missing.append(name)
            return lambda _loaded: None
        policy = self.per_rank.on_resize
        restorer.ignored.update(leaf for one in names for leaf in tree.leaves(one))
        if not callable(policy) or len(names) == ranks:
            chosen = resize(names, rank, ranks, policy, key=name)
            return self._read(restorer, chosen) if chosen is not DROPPED else lambda _loaded: None
        take = self._taker(name)
        builds = [
            restorer.restore(names[one], NOTHING, stateful=True)
            for one in needed(len(names), rank, ranks, policy)
        ]

        def apply(loaded: Loaded) -> None:
            take(resize([build(loaded) for build in builds], rank, ranks, policy, key=name))

        return apply

    def _read(self, restorer: Restorer, name: str) -> Apply:
        build = restorer.restore(name, self.per_rank.value, stateful=True)

        def apply(loaded: Loaded) -> None:
            self.per_rank.value = build(loaded)

        return apply

    def _taker(self, name: str) -> Callable[[Any], object]:
        """Return what takes a value that a function has made of those of all ranks."""
        value = self.per_rank.value
        if not live.is_live(value):
            return partial(setattr, self.per_rank, "value")
        if isinstance(self.owners[value], StatefulOwner):
            return value.load_state_dict  # type: ignore[no-any-return]
        raise ConfigurationError(
            f"the PerRank at {name!r} holds a {type(value).__name__}, whose state no function can make",
            hint="Put modules and optimizers into the state itself, where they load on any number of ranks",
        )
