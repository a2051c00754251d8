"""A training state as users have it: modules, optimizers, whatever has a state_dict, tensors, values."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, TypeGuard, TypeVar

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from cloudckpt.backends.errors import ConfigurationError

T = TypeVar("T")


class AppState:
    """The values of a state, as DCP takes them, and back.

    Modules and optimizers go through DCP's ``get_state_dict`` and ``set_state_dict``, which know FSDP, DDP
    and ``torch.compile``: names are those of the plain module, and a checkpoint fits another parallelism. An
    optimizer's model must be in the same state. All else is DCP's business, and so is one whose class derives
    from DCP's ``Stateful``, such as torchtitan's container of optimizers.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(
                f"a state is a dict, and not a {type(state).__name__}",
                hint='Write {"model": model, "optimizer": optimizer, "step": step}',
            )
        if strange := next((key for key in state if not isinstance(key, str)), None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"a state's keys are text, and {strange!r} is not")
        self._state = state

    def as_dcp_has_it(self) -> dict[str, Any]:
        """The state for ``dcp.save``.

        Raises:
            ConfigurationError: an optimizer's model is not in the state.
        """
        return {key: self._described(key, value) for key, value in self._state.items()}

    def to_load(self) -> dict[str, Any]:
        """The state for ``dcp.load``, which finds nothing in it that it would have to ask itself.

        Raises:
            ConfigurationError: an optimizer's model is not in the state.
        """
        described = self.as_dcp_has_it()
        for key, value in self._stateful():
            described[key] = value.state_dict()
        return described

    def take(self, loaded: Mapping[str, Any]) -> None:
        """Take over what ``dcp.load`` has made of `to_load`.

        Raises:
            ConfigurationError: a value can't be put into the state.
        """
        for key, value in self._stateful():
            value.load_state_dict(loaded[key])
        for key, value in self._state.items():
            if _is_plain(value, nn.Module):
                set_model_state_dict(value, loaded[key])
        for key, value in self._state.items():  # after their models
            if _is_plain(value, Optimizer):
                set_optimizer_state_dict(self._model_of(key, value), value, loaded[key])
        for key, value in list(self._state.items()):
            if loaded[key] is value or isinstance(value, nn.Module | Optimizer | Stateful):
                continue
            if not isinstance(self._state, MutableMapping):
                raise ConfigurationError(
                    f"the value at {key!r} was loaded and can't be put into a {type(self._state).__name__}",
                    hint="Give the state as a dict",
                )
            self._state[key] = loaded[key]

    def _stateful(self) -> list[tuple[str, Stateful]]:
        """Return the values whose state DCP would ask for: those with one, but modules and optimizers.

        In DCP's order: on every rank the same, for what they do may be a collective.
        """
        return [
            (key, value)
            for key, value in sorted(self._state.items(), key=lambda item: item[0])
            if isinstance(value, Stateful)
            and not (_is_plain(value, nn.Module) or _is_plain(value, Optimizer))
        ]

    def _described(self, key: str, value: Any) -> Any:
        if _is_plain(value, nn.Module):
            return get_model_state_dict(value)
        if _is_plain(value, Optimizer):
            untouched = not value.state
            described = get_optimizer_state_dict(self._model_of(key, value), value)
            if untouched:  # DCP has had it take a step, to see its state: training still takes the first
                value.state.clear()
            return described
        return value

    def _model_of(self, key: str, optimizer: Optimizer) -> nn.Module:
        parameters = {id(one) for group in optimizer.param_groups for one in group["params"]}
        for value in self._state.values():
            if isinstance(value, nn.Module) and parameters <= {id(one) for one in value.parameters()}:
                return value
        raise ConfigurationError(
            f"the optimizer at {key!r} has parameters that no model in the state has all of",
            hint="Save a model and its optimizer in one state; put several models of one optimizer into a "
            "ModuleDict",
        )


def _is_plain(value: Any, kind: type[T]) -> TypeGuard[T]:
    """Whether a value is one, and leaves it to others what its state is.

    ``isinstance`` can't tell: for DCP's protocol all that has the two methods is ``Stateful``.
    """
    return isinstance(value, kind) and Stateful not in type(value).__mro__
