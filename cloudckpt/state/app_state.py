"""A user's training state: modules, optimizers, other objects with a state_dict, tensors, values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.state.flatten import flatten
from cloudckpt.backends.state.load_planner import Targets
from cloudckpt.backends.state.markers import CheckpointState
from cloudckpt.backends.state.tree import SavedTree
from cloudckpt.executor.coordination.rendezvous import grouped
from cloudckpt.state.describe import Describer
from cloudckpt.state.owners import Owners
from cloudckpt.state.per_rank import PerRank
from cloudckpt.state.restore import Build, Loaded, Restorer


class AppState:
    """The values of a state, as DCP takes them, and back.

    Names are DCP's: those of the plain module, without the wrappers of FSDP, DDP and ``torch.compile``, so
    that a checkpoint fits another parallelism and stock DCP reads it. An optimizer's model must be in the
    same state.

    Args:
        state: a dict.
        group: the ranks that save and load it; None for all.
        trust: values may be saved that load with ``trust=True`` alone.

    Raises:
        ConfigurationError: the state is no dict with text as keys.
    """

    def __init__(
        self, state: Mapping[str, Any], group: dist.ProcessGroup | None = None, *, trust: bool = False
    ) -> None:
        if not isinstance(state, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(
                f"a state is a dict, and not a {type(state).__name__}",
                hint='Write {"model": model, "optimizer": optimizer, "step": step}',
            )
        if strange := next((key for key in state if not isinstance(key, str)), None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"a state's keys are text, and {strange!r} is not")
        self._state = state
        self._trust = trust
        self._rank = dist.get_rank(group) if grouped() else 0
        self._ranks = dist.get_world_size(group) if grouped() else 1
        self._restoring: _Restoring | None = None
        self._owners: Owners | None = None

    def describe(self) -> CheckpointState:
        """Return the state for a save, every value of which is known to load again.

        Raises:
            ConfigurationError: a value can't be saved and restored, or an optimizer's model is not in the
                state.
        """
        owners = self._asked()
        try:
            described = CheckpointState(Describer(owners, trust=self._trust).mapping(self._state))
        except RecursionError as error:
            raise ConfigurationError(
                "the state holds itself, or is nested too deeply", hint="Look for a list that is in itself"
            ) from error
        described.trust = self._trust
        described.allowed = tuple(torch.serialization.get_safe_globals())
        return described

    def plan(self) -> CheckpointState:
        """Return the same, and find what only the plan of a save finds, such as names that meet."""
        described = self.describe()
        flatten(described)
        return described

    def prepare(self) -> Owners:
        """Ask modules, optimizers and others for the state that they have now, before a load.

        Raises:
            ConfigurationError: an optimizer's model is not in the state, or a module has no data.
        """
        self._owners = self._asked()
        return self._owners

    def _asked(self) -> Owners:
        owners = Owners.of(self._state, self._rank, self._ranks)
        owners.ask()
        return owners

    def choose(self, metadata: Metadata) -> Targets:
        """Return what to read of a checkpoint, and into what.

        Raises:
            ConfigurationError: the checkpoint lacks what the state asks for, or has it in another form.
        """
        restoring = _Restoring(self._owners or self.prepare())
        tree = SavedTree(metadata)
        meshes = [*{id(mesh): mesh for mesh in _meshes(self._state)}.values()]
        restorer = Restorer(tree, meshes, restoring.visit)
        for key, value in self._state.items():
            restoring.builds[key] = restorer.restore(key, value)
        restorer.raise_missing()
        restoring.unasked = _unasked(tree, restorer)
        self._restoring = restoring
        return restorer.targets

    @property
    def unasked(self) -> frozenset[str]:
        """Names that the checkpoint has and `choose` did not ask for.

        Keys at the top of which it asked for nothing, and names of other values.
        """
        return self._restoring.unasked if self._restoring is not None else frozenset()

    def take(self, loaded: Loaded) -> None:
        """Take over what was loaded of `choose`.

        Raises:
            ConfigurationError: a value can't be put into the state.
        """
        restoring = self._restoring
        if restoring is None:
            raise RuntimeError("a state takes what was loaded of its own choice")
        for apply in restoring.in_order():
            apply(loaded)
        for key, build in restoring.builds.items():
            value = build(loaded)
            if value is self._state[key]:
                continue
            if not isinstance(self._state, MutableMapping):
                raise ConfigurationError(
                    f"the value at {key!r} was loaded and can't be put into a {type(self._state).__name__}",
                    hint="Give the state as a dict",
                )
            self._state[key] = value


@dataclass(slots=True)
class _Restoring:
    """A load under way."""

    owners: Owners
    builds: dict[str, Build] = field(default_factory=dict)
    applies: list[tuple[int, Callable[[Loaded], None]]] = field(default_factory=list)
    unasked: frozenset[str] = frozenset()

    def visit(self, restorer: Restorer, name: str, value: Any) -> Build:
        owner = self.owners[value]
        apply = owner.restore(restorer, name)
        self.applies.append((owner.turn, apply))
        return lambda _loaded: value

    def in_order(self) -> list[Callable[[Loaded], None]]:
        """Return what gives objects their state: optimizers after their models."""
        return [apply for _, apply in sorted(self.applies, key=lambda one: one[0])]


def _meshes(value: Any) -> Iterator[DeviceMesh]:
    """Yield the device meshes of a state's tensors."""
    if isinstance(value, DTensor):
        yield value.device_mesh
    elif isinstance(value, torch.nn.Module):
        yield from _meshes([*value.parameters()])
    elif isinstance(value, torch.optim.Optimizer):
        yield from _meshes([group["params"] for group in value.param_groups])
    elif isinstance(value, PerRank):
        yield from _meshes(value.value)
    elif isinstance(value, Mapping):
        yield from _meshes([*value.values()])
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _meshes(inner)


def _unasked(tree: SavedTree, restorer: Restorer) -> frozenset[str]:
    asked = restorer.targets.tensors.keys() | restorer.ignored
    left = frozenset(tree.entries) - asked
    tops = {tree.top(name) for name in left} - {tree.top(name) for name in asked}
    return frozenset(top if (top := tree.top(name)) in tops else name for name in left)
