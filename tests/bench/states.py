"""The states that the storage comparison saves and loads: large tensors, many small ones, a training state.

A state is made as a pair: what is saved, and tensors of the same shapes to load into.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict

State = dict[str, Any]
UNSET = "not loaded"
"""What an emptied state holds where a plain value belongs."""


class Shape(Protocol):
    """What a state is like; it travels to the processes that make the state."""

    @property
    def name(self) -> str:
        """What ``--only`` calls it."""
        ...

    @property
    def title(self) -> str: ...

    def lay(self, folder: Path) -> None:
        """Put into the folder what all processes share, once, before any of them makes the state."""
        ...

    def make(self, folder: Path) -> tuple[State, State]:
        """The state to save, and one to load into."""
        ...


@dataclass(frozen=True, slots=True)
class Large:
    """Tensors of some MiB, each with a storage of its own, in files that every process maps.

    Shared, because each process would need twice the state otherwise; it is one peer's turn at a time. The
    pages are as large as those that torch gets for a tensor of its own.
    """

    tensors: int
    elements: int
    name: str = "large"

    @property
    def title(self) -> str:
        return f"{self.tensors} x {_size(4 * self.elements)}"

    def lay(self, folder: Path) -> None:
        for tensor in self._mapped(folder, "saved").values():
            tensor.uniform_()

    def make(self, folder: Path) -> tuple[State, State]:
        return {"model": self._mapped(folder, "saved")}, {"model": self._mapped(folder, "loaded")}

    def _mapped(self, folder: Path, kind: str) -> dict[str, Tensor]:
        return {
            f"tensor-{number}": torch.from_file(f"{folder}/{kind}-{number}", shared=True, size=self.elements)
            for number in range(self.tensors)
        }


@dataclass(frozen=True, slots=True)
class Small:
    """Many tensors of some KiB."""

    tensors: int
    elements: int = 4096
    name: str = "small"

    @property
    def title(self) -> str:
        return f"{self.tensors} x {_size(4 * self.elements)}"

    def lay(self, folder: Path) -> None:
        """Nothing is shared."""

    def make(self, folder: Path) -> tuple[State, State]:
        torch.manual_seed(0)
        saved = {f"tensor-{number}": torch.rand(self.elements) for number in range(self.tensors)}
        return {"model": saved}, {"model": {name: torch.empty_like(tensor) for name, tensor in saved.items()}}


@dataclass(frozen=True, slots=True)
class Training:
    """A transformer's encoder and what AdamW keeps of it after a step, as ``get_state_dict`` gives them."""

    layers: int
    width: int
    name: str = "training"

    @property
    def title(self) -> str:
        return f"transformer, {self.layers} layers of {self.width}, with AdamW"

    def lay(self, folder: Path) -> None:
        """Nothing is shared."""

    def make(self, folder: Path) -> tuple[State, State]:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(self.width, 8, 4 * self.width, batch_first=True)
        model = nn.TransformerEncoder(layer, self.layers, enable_nested_tensor=False)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.rand(2, 8, self.width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        weights, moments = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": moments}
        return saved, copy.deepcopy(saved)


def tensors_of(state: State) -> list[Tensor]:
    return [leaf.detach() for _, leaf in _leaves(state, "") if isinstance(leaf, Tensor)]


def bytes_of(state: State) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(state))


def emptied(value: Any) -> Any:
    """The same tensors, filled with what no state holds, in a state without plain values."""
    if isinstance(value, Mapping):
        return {key: emptied(inner) for key, inner in value.items()}
    if isinstance(value, Tensor):
        return value.detach().fill_(math.nan)
    if isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        return [emptied(inner) for inner in value]
    return UNSET


def differences(loaded: State, saved: State) -> list[str]:
    """Names of the leaves that are not what was saved, bit for bit, in order."""
    found, expected = dict(_leaves(loaded, "")), dict(_leaves(saved, ""))
    return [
        name
        for name in sorted(expected.keys() | found.keys())
        if name not in found or name not in expected or not _same(found[name], expected[name])
    ]


def _same(found: Any, expected: Any) -> bool:
    if type(found) is not type(expected):
        return False
    if not isinstance(expected, Tensor):
        return bool(found == expected)
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    left, right = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (found, expected))
    return torch.equal(left, right)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value; a list without mappings is one value, as it is to DCP."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{name}.{index}")
    else:
        yield name, value


def _size(nbytes: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1 << 10:
            return f"{nbytes} {unit}"
        nbytes //= 1 << 10
    return f"{nbytes} GiB"
