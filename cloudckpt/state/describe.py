"""Describing a state for a save: live objects replaced by their state, everything else checked."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.state import markers, tensors, values
from cloudckpt.backends.state.flatten import factory_of, is_leaf_list, kind_of, refused
from cloudckpt.backends.state.records import plain_key
from cloudckpt.state import live
from cloudckpt.state.live import joined
from cloudckpt.state.owners import Owners

_MARKERS = (markers.Rank0Only, markers.Placed, markers.OwnNames)


class Describer:
    """Describes the state of one save.

    Args:
        owners: of the live objects in it, which have been asked.
        trust: allow values that load with ``trust=True`` alone.
    """

    def __init__(self, owners: Owners, *, trust: bool) -> None:
        self._owners = owners
        self._trust = trust
        self._in_place = True
        """The state that is loaded into has such a tensor. An optimizer that has taken no step has none."""
        self._around: set[int] = set()
        """Containers around the one that is described, by identity."""

    def value(self, value: Any, name: str) -> Any:
        """Describe a value.

        Raises:
            ConfigurationError: it can't be saved and restored.
        """
        if isinstance(value, torch.Tensor):
            self._check_tensor(value, name)
            return value
        if isinstance(value, _MARKERS):
            if isinstance(value, markers.Placed):
                self._check_tensor(value.tensor, name)
            return value
        if live.is_live(value):
            return self._owners[value].describe(self, name)
        if isinstance(value, Mapping):
            return self._around_it(value, name, self.mapping)
        if type(value) in (list, tuple) and next(live.find(value), None) is not None:
            return markers.SequenceState(type(value).__name__, self._around_it(value, name, self._items))
        if type(value) is list and not is_leaf_list(value):
            return self._around_it(value, name, self._items)
        if isinstance(value, list) and type(value) is not list:
            raise refused(value, name, "list")
        if type(value) is collections.deque and any(isinstance(one, torch.Tensor) for one in value):
            # A value is pickled whole: its tensors would be no tensors of the checkpoint.
            raise refused(value, name, "list", of=" of tensors")
        self._check(value, name)
        return value

    def module(self, state: Mapping[str, Any], name: str) -> markers.ModuleState:
        """Describe the state of a module."""
        described = markers.ModuleState()
        for fqn, value in state.items():
            leaf = value.leaf if isinstance(value, markers.Rank0Only) else value
            if isinstance(leaf, torch.Tensor):
                self._check_tensor(leaf, joined(name, fqn))
                described[fqn] = value
            else:
                described[fqn] = self.value(value, joined(name, fqn))
        return described

    def mapping(self, value: Mapping[Any, Any], name: str = "") -> Mapping[Any, Any]:
        """Describe a mapping.

        Raises:
            ConfigurationError: it is of a class that can't be restored, or has such keys.
        """
        kind = type(value)
        if not name:
            return {key: self.value(inner, str(key)) for key, inner in value.items()}
        kind_of(value, name)
        if kind is markers.OptimizerState and self._in_place:
            self._in_place = False
            try:
                return self.mapping(value, name)
            finally:
                self._in_place = True
        made: Any = kind()
        if isinstance(value, collections.defaultdict):
            factory_of(value, name)
            made.default_factory = value.default_factory
        for key, inner in value.items():
            made[plain_key(key, name)] = self.value(inner, joined(name, key))
        return made  # type: ignore[no-any-return]

    def _items(self, value: Sequence[Any], name: str) -> list[Any]:
        return [self.value(inner, joined(name, index)) for index, inner in enumerate(value)]

    def _around_it(self, value: Any, name: str, describe: Any) -> Any:
        if id(value) in self._around or len(self._around) > live.DEEPEST:
            what = "holds itself" if id(value) in self._around else "is nested too deeply"
            raise ConfigurationError(
                f"the container at {name!r} {what}, and can't be saved", hint="Make flat, plain data of it"
            )
        self._around.add(id(value))
        try:
            return describe(value, name)
        finally:
            self._around.remove(id(value))

    def _check_tensor(self, tensor: torch.Tensor, name: str) -> None:
        refusal = tensors.refusal(tensor, trust=self._trust, in_place=self._in_place)
        if refusal is not None:
            raise ConfigurationError(
                f"the tensor at {name!r}, a {refusal.class_name}, {refusal.reason}", hint=refusal.hint
            )

    def _check(self, value: Any, name: str) -> None:
        refusal = values.refusal(value, trust=self._trust)
        if refusal is not None:
            raise ConfigurationError(
                f"the value at {name + refusal.path!r} is a {refusal.class_name}, which can't be restored: "
                f"{refusal.reason}",
                hint=refusal.hint,
            )
