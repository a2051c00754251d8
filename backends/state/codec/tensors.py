"""Builders of tensors and of torch's own small classes, and the memory that tensors get from the archive.

The names of torch's rebuild functions, of its storage classes and of the map between those and dtypes are
private. They are what ``torch.save`` writes, so that a version without them could not read its own files.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cloudckpt.backends import strides
from cloudckpt.backends.state.codec.arguments import Arguments, checked
from cloudckpt.backends.state.codec.malformed import MalformedError, NotHereError
from cloudckpt.backends.state.codec.tree import NOTHING, Global
from cloudckpt.backends.torch_private import get_layout, set_tensor_metadata, storage_types

_LARGEST = (1 << 63) - 1
_TYPED: dict[str, torch.dtype] = {f"torch.{name}": dtype for dtype, name in storage_types().items()}
"""The dtypes of storages by the names of their classes. The names of types not in it are of untyped ones."""
_UNTYPED = "torch.storage.UntypedStorage"
_METADATA = frozenset({"conj", "neg"})


@dataclass(frozen=True, slots=True)
class Memory:
    """A storage, and the type that its class says its elements have."""

    storage: torch.UntypedStorage
    dtype: torch.dtype | None


class Storages:
    """Hands out the memory of tensors from an archive.

    Args:
        archive: torch's reader of it.
        on_cpu: leaves on the CPU what was on another device.
    """

    def __init__(self, archive: Any, *, on_cpu: bool = False) -> None:
        self._archive = archive
        self._on_cpu = on_cpu
        self._made: dict[str, Memory] = {}
        order = archive.get_record("byteorder") if archive.has_record("byteorder") else b"little"
        self._swapped = checked_order(order) != sys.byteorder

    def load(self, described: object) -> Memory:
        """Return the storage that a pickle asks for.

        Raises:
            MalformedError: the archive has no such one.
            NotHereError: its device is not there.
        """
        match described:
            case ("storage", Global() as kind, str(key), str(place), int(count)) if 0 <= count <= _LARGEST:
                dtype = None if kind.full_name == _UNTYPED else _TYPED.get(kind.full_name)
                if dtype is None and kind.full_name != _UNTYPED:
                    raise MalformedError(f"{kind.full_name} is no class of storages")
            case _:
                raise MalformedError("its pickle asks for something other than a storage")
        size = count * (1 if dtype is None else dtype.itemsize)
        if key not in self._made:
            self._made[key] = Memory(self._read(key, size, place, dtype), dtype)
        made = self._made[key]
        if made.dtype != dtype or made.storage.nbytes() != size:
            raise MalformedError("its pickle claims two kinds of one storage")
        return made

    def _read(self, key: str, size: int, place: str, dtype: torch.dtype | None) -> torch.UntypedStorage:
        data = self._archive.get_record(f"data/{key}")
        if len(data) != size:
            raise MalformedError(f"a storage has {len(data):,} bytes and should have {size:,}")
        made_of: Any = torch.UntypedStorage
        storage: Any = made_of(size)
        if size:
            bytes_of = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, 0, (size,), (1,)).copy_(bytes_of)
        if self._swapped and dtype is not None:
            storage.byteswap(dtype)
        if place == "meta":
            raise MalformedError("a tensor in it has no data")
        if place == "cpu" or self._on_cpu:
            found: torch.UntypedStorage = storage
            return found
        try:
            restore: Any = torch.serialization.default_restore_location
            restored: torch.UntypedStorage = restore(storage, place)
        except Exception as error:  # torch names the device in a different exception for each kind
            raise NotHereError(
                f"a tensor in it was saved on {place[:100]!r}, which is not there",
                "Load it where that device is, or save the tensor in a dict or a list, where any will do",
            ) from error
        return restored


def checked_order(order: object) -> str:
    """Return the byte order that an archive names."""
    if order not in (b"little", b"big"):
        raise MalformedError("its archive names an unknown byte order")
    return "little" if order == b"little" else "big"


def _tensor_of_typed(given: Arguments) -> torch.Tensor:
    memory, first, size, stride, grad, hooks, *metadata = given.bare(6, 7)
    return _tensor(memory, checked(memory, Memory).dtype, (first, size, stride), (grad, hooks, *metadata))


def _tensor_of_untyped(given: Arguments) -> torch.Tensor:
    memory, first, size, stride, grad, hooks, dtype, *metadata = given.bare(7, 8)
    return _tensor(memory, checked(dtype, torch.dtype), (first, size, stride), (grad, hooks, *metadata))


def _tensor(
    memory: Any,
    dtype: torch.dtype | None,
    place: tuple[Any, Any, Any],
    more: tuple[Any, ...],
) -> torch.Tensor:
    storage = checked(memory, Memory).storage
    grad, hooks, *metadata = more
    first, shape, stride = checked(place[0], int), _sizes(place[1]), _sizes(place[2])
    if dtype is None or len(shape) != len(stride) or first < 0:
        raise MalformedError("a tensor has no dtype, or is laid out in no way that there is")
    if (first + strides.span(shape, stride)) * dtype.itemsize > storage.nbytes():
        raise MalformedError("a tensor does not fit into its storage")
    _check_hooks(hooks)
    tensor = torch.empty(0, dtype=dtype, device=storage.device)
    tensor.set_(storage, first, shape, stride)
    tensor.requires_grad_(checked(grad, bool))
    for one in metadata:
        marks = checked(one, dict)
        if not (marks.keys() <= _METADATA and all(value is True for value in marks.values())):
            raise MalformedError("a tensor has unknown marks")
        if marks and not dtype.is_complex and "conj" in marks:
            raise MalformedError("a tensor of real numbers is marked as conjugate")
        set_tensor_metadata(tensor, marks)
    return tensor


def _check_hooks(hooks: object) -> None:
    if checked(hooks, collections.OrderedDict, type(None)):
        raise MalformedError("a tensor has hooks")


def _sizes(sizes: object) -> tuple[int, ...]:
    numbers: Sequence[Any] = checked(sizes, tuple, torch.Size)
    if not all(type(one) is int and 0 <= one <= _LARGEST for one in numbers):
        raise MalformedError("a tensor has a size that is no number of elements")
    return tuple(numbers)


def _parameter(given: Arguments) -> torch.nn.Parameter:
    data, grad, hooks = given.bare(3)
    _check_hooks(hooks)
    return torch.nn.Parameter(checked(data, torch.Tensor), checked(grad, bool))


def _size(given: Arguments) -> torch.Size:
    (sizes,) = given.bare(1)
    return torch.Size(_sizes(sizes))


def _device(given: Arguments) -> torch.device:
    kind, *index = given.bare(1, 2)
    return torch.device(checked(kind, str), *(checked(one, int) for one in index))


def _layout(given: Arguments) -> torch.layout:
    (name,) = given.bare(1)
    get: Any = get_layout
    layout: torch.layout = get(checked(name, str))
    return layout


def constant(module: str, name: str) -> Any:
    """Return the dtype of this name, or ``NOTHING``."""
    found = vars(torch).get(name) if module == "torch" else None
    return found if isinstance(found, torch.dtype) else NOTHING


BUILDERS: dict[str, Callable[[Arguments], object]] = {
    "torch._utils._rebuild_tensor_v2": _tensor_of_typed,
    "torch._utils._rebuild_tensor_v3": _tensor_of_untyped,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
}
NAMED = frozenset({*_TYPED, _UNTYPED})
