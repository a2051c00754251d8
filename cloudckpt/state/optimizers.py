"""The state of optimizers by the names of their parameters, in DCP's layout and without its trial step.

DCP has an optimizer take a step with zero gradients, to see its state. That changes what it is to save, fails
for optimizers that need a closure or sparse gradients, and is left out where there are gradients. Here state
that exists is saved, and state that does not exist stays absent, also after a load.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.state.markers import OptimizerState, OwnNames, Placed
from cloudckpt.state import modules

_PARAMS = "params"
_NAMES = "param_names"


@dataclass(frozen=True)
class NamedOptimizer:
    """An optimizer whose state is named by the parameters of a module.

    Args:
        name: of the optimizer in the state.
        optimizer: the optimizer.
        module: has all of its parameters.
        state: the optimizer's own state dict, which names parameters by numbers.
    """

    name: str
    optimizer: Optimizer
    module: nn.Module
    state: Mapping[str, Any]

    def ask(self) -> None:
        """Gather what the names and layouts of the state need."""

    def describe(self) -> OptimizerState:
        """Return the state of the optimizer by the names of its parameters.

        Raises:
            ConfigurationError: it has state that belongs to no parameter.
        """
        names = [aliases[0] for aliases in self._aliases]
        parameters = [*_parameters(self.optimizer)]
        state: dict[str, Any] = {}
        for number, held in self.state["state"].items():
            if type(number) is not int:
                raise ConfigurationError(
                    f"the optimizer at {self.name!r} has state that belongs to no parameter: {number!r}",
                    hint="Save it beside the optimizer, as a value of its own",
                )
            state[names[number]] = _marked(held, parameters[number])
        groups: list[dict[str, Any]] = []
        for group in self.state["param_groups"]:
            described = {key: value for key, value in group.items() if key not in (_PARAMS, _NAMES)}
            if _NAMES in group:
                described[_NAMES] = OwnNames([*group[_NAMES]])
            described[_PARAMS] = OwnNames([names[number] for number in group[_PARAMS]])
            groups.append(described)
        return OptimizerState({"state": state, "param_groups": groups})

    @functools.cached_property
    def _aliases(self) -> list[list[str]]:
        """The names of each parameter, in the optimizer's order."""
        named = modules.names_of(self.module)
        return [named[parameter] for parameter in _parameters(self.optimizer)]

    @functools.cached_property
    def _own(self) -> list[torch.Tensor]:
        return [*_parameters(self.optimizer)]

    def names(self) -> Iterator[tuple[Any, list[str]]]:
        """Yield the key of each parameter in the state that `restore` takes, and its names."""
        yield from enumerate(self._aliases)

    def blank(self, key: Any, part: str, entry: TensorStorageMetadata) -> torch.Tensor | None:
        """Make a tensor of the state to read into, if it is laid out as its parameter is.

        Args:
            key: of the parameter, from `names`.
            part: key of the tensor in the parameter's state.
            entry: of the tensor in the checkpoint.
        """
        parameter = self._own[key]
        if not is_alike(entry.size, parameter, part):
            return None
        return torch.empty_like(parameter, dtype=entry.properties.dtype, requires_grad=False).detach()

    def restore(
        self,
        state: Mapping[Any, Any],
        groups: Sequence[Mapping[str, Any]],
        lists: Sequence[Sequence[str]],
        *,
        complete: bool,
    ) -> None:
        """Give the optimizer what was loaded.

        Args:
            state: of each parameter that had one, by its number.
            groups: the groups that were saved.
            lists: names of the parameters of each of those groups, on all ranks.
            complete: the lists are known to have the parameters of all ranks.

        Raises:
            ConfigurationError: the groups that were saved don't fit.
        """
        matched = self._matched(groups, lists, complete=complete)
        self._load({"state": dict(state), "param_groups": _merged(self._own_groups(), matched)})

    def _own_groups(self) -> Sequence[Mapping[str, Any]]:
        """Return the optimizer's own groups, whose ``params`` are keys of `names`."""
        groups: Sequence[Mapping[str, Any]] = self.state["param_groups"]
        return groups

    def _load(self, loaded: dict[str, Any]) -> None:
        """Give the optimizer its state and groups, whose parameters are named by keys of `names`."""
        self.optimizer.load_state_dict(loaded)
        for number, parameter in enumerate(_parameters(self.optimizer)):
            if number in loaded["state"]:
                _undo_casts(self.optimizer.state[parameter], loaded["state"][number])

    def _matched(
        self, groups: Sequence[Mapping[str, Any]], lists: Sequence[Sequence[str]], *, complete: bool
    ) -> list[Mapping[str, Any]]:
        """Return the saved group of each of the optimizer's own groups."""
        of: dict[str, int] = {name: index for index, names in enumerate(lists) for name in names}
        aliases, own = dict(self.names()), self._own_groups()
        matched = []
        for index, group in enumerate(own):
            found: dict[int, str] = {}
            for key in group[_PARAMS]:
                names = aliases[key]
                at = next((of[name] for name in names if name in of), None)
                if at is None and complete:
                    raise ConfigurationError(
                        f"the optimizer at {self.name!r} has the parameter {names[0]!r}, which the "
                        "checkpoint's did not have",
                        hint="Build the optimizer that was saved",
                    )
                if at is not None:
                    found.setdefault(at, names[0])
            if not found and index < len(groups):
                found[index] = ""
            first, *others = [*found] or [-1]
            if first < 0:
                raise ConfigurationError(
                    f"the optimizer at {self.name!r} has {len(own)} groups of parameters, "
                    f"and the checkpoint's had {len(groups)}",
                    hint="Build the optimizer with the groups that were saved; one may be empty",
                )
            for other in others:
                if not _same_options(groups[first], groups[other]):
                    raise ConfigurationError(
                        f"the optimizer at {self.name!r} has {found[first]!r} and {found[other]!r} in one "
                        "group, and the checkpoint's had them in groups of different options",
                        hint="Build the optimizer with the groups that were saved",
                    )
            matched.append(groups[first])
        return matched


def checked(groups: Any, name: str) -> list[dict[str, Any]]:
    """Return groups of parameters that were loaded.

    Raises:
        ConfigurationError: they are none.
    """
    if isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get(_PARAMS), list) for group in groups
    ):
        return groups
    raise ConfigurationError(
        f"the checkpoint has no groups of parameters at {name!r}", hint="Build the state that was saved"
    )


def is_alike(shape: torch.Size, parameter: torch.Tensor, key: str) -> bool:
    """Return whether a tensor of an optimizer's state is laid out as its parameter is.

    Args:
        shape: of the state's tensor, globally.
        parameter: its parameter.
        key: of the tensor in the state of the parameter. A ``step`` counts; it is no element of a tensor.
    """
    return key != "step" and shape == parameter.shape


def module_of(name: str, optimizer: Optimizer, candidates: Sequence[nn.Module]) -> nn.Module:
    """Return the module that has all of an optimizer's parameters.

    Raises:
        ConfigurationError: none of the candidates has.
    """
    parameters = {id(one) for one in _parameters(optimizer)}
    for module in candidates:
        if parameters <= {id(one) for one in module.parameters()}:
            return module
    raise ConfigurationError(
        f"the optimizer at {name!r} has parameters that no model in the state has all of",
        hint="Save a model and its optimizer in one state; put several models of one optimizer, or "
        "parameters outside of a model, into a ModuleDict or ParameterDict",
    )


def is_standard(state: object) -> bool:
    """Return whether a state dict has the form of ``Optimizer.state_dict``."""
    if not (isinstance(state, dict) and state.keys() == {"state", "param_groups"}):
        return False
    groups = state["param_groups"]
    return isinstance(groups, list) and all(
        isinstance(group, dict)
        and isinstance(group.get(_PARAMS), list)
        and all(type(number) is int for number in group[_PARAMS])
        for group in groups
    )


def _parameters(optimizer: Optimizer) -> Iterator[Any]:
    for group in optimizer.param_groups:
        yield from group[_PARAMS]


def _marked(held: Any, parameter: torch.Tensor, key: str = "") -> Any:
    """Mark the tensors of a parameter's state that are not placed as a load would expect."""
    if isinstance(held, torch.Tensor):
        alike = is_alike(held.shape, parameter, key)
        expected = isinstance(parameter, DTensor) and alike
        if isinstance(held, DTensor) != expected or (
            isinstance(held, DTensor)
            and isinstance(parameter, DTensor)
            and (held.placements != parameter.placements or held.device_mesh != parameter.device_mesh)
        ):
            return Placed(held)
        return held
    if isinstance(held, dict):
        made = held.copy()
        for inner, value in held.items():
            made[inner] = _marked(value, parameter, str(inner))
        return made
    if type(held) is list and any(isinstance(one, torch.Tensor) for one in held):
        return [_marked(one, parameter) for one in held]
    return held


def _merged(own: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return groups with the options that were saved; options that are newer than that stay.

    A learning rate that is a tensor may be one for several groups, which a scheduler changes in place.
    """
    groups = []
    shared: dict[int, torch.Tensor] = {}
    for fresh, options in zip(own, saved, strict=True):
        group = {**fresh, **options, _PARAMS: fresh[_PARAMS]}
        group.pop(_NAMES, None)
        if _NAMES in fresh:
            group[_NAMES] = fresh[_NAMES]
        for key, value in fresh.items():
            if isinstance(value, torch.Tensor) and isinstance(group[key], torch.Tensor):
                tensor = group[key].to(value.device)
                first = shared.setdefault(id(value), tensor)
                group[key] = first if torch.equal(first, tensor) else tensor
        groups.append(group)
    return groups


def _same_options(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    def options(group: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: value.tolist() if isinstance(value, torch.Tensor) else value
            for key, value in group.items()
            if key not in (_PARAMS, _NAMES)
        }

    return options(one) == options(other)


def _undo_casts(held: Any, exact: Mapping[str, Any]) -> None:
    """Put back the tensors whose dtype ``load_state_dict`` has changed to that of the parameter."""
    for key, tensor in exact.items():
        now = held.get(key)
        if isinstance(tensor, torch.Tensor) and isinstance(now, torch.Tensor) and now.dtype != tensor.dtype:
            held[key] = tensor.to(now.device)
