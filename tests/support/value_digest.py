"""A digest of a value, equal for equal values on every rank."""

from __future__ import annotations

import collections
import copyreg
import enum
import hashlib
import io
import struct
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from cloudckpt.backends.state.codec import classes
from cloudckpt.backends.transfer.segments import bytes_of

_SIZE = 16
"""Bytes of a digest."""
_PLAIN = frozenset({bool, int, float, str, bytes, type(None)})
"""Classes of which equal instances have equal texts, and different ones different texts."""
_X87 = 10
"""Bytes of an extended float that are part of the number; others are whatever was in memory."""


def digest(value: object) -> bytes:
    """Return 16 bytes that are equal for equal values of equal classes.

    The order of a set's elements and of a dict's keys does not matter, nor do a tensor's device, strides and
    memory. An object of an unknown class is described by what it pickles as.

    Raises:
        Exception: an object can't be pickled.
    """
    return _Digest().of(value)


class _Digest:
    """One digest under way."""

    def __init__(self) -> None:
        self._known: dict[int, bytes] = {}
        self._kept: list[object] = []
        """What the identities in ``_known`` are of, which may have been made on the way."""

    def of(self, value: Any) -> bytes:
        cls = type(value)
        if cls in _PLAIN:
            return _hash(cls.__name__, _text(value))
        if (known := self._known.get(id(value))) is not None:
            return known
        self._known[id(value)] = b"within itself"
        self._kept.append(value)
        result = _TABLE.get(cls, _Digest._other)(self, value)
        self._known[id(value)] = result
        return result

    def of_series(self, value: Any) -> bytes:
        kinds = list(map(type, value))
        name = type(value).__name__
        if set(kinds) <= _PLAIN:
            try:
                return _hash(name, b"plain", repr(list(value)).encode("utf-8", "surrogatepass"))
            except ValueError:  # a number of too many digits
                pass
        return _hash(name, *map(self.of, value))

    def of_set(self, value: Any) -> bytes:
        return _hash(type(value).__name__, *sorted(map(self.of, value)))

    def of_dict(self, value: Any) -> bytes:
        return _hash(type(value).__name__, *sorted(self._pairs(value.items())))

    def of_ordered(self, value: Any) -> bytes:
        return _hash(type(value).__name__, *self._pairs(value.items()))

    def of_default(self, value: Any) -> bytes:
        return _hash("defaultdict", self.of(value.default_factory), *sorted(self._pairs(value.items())))

    def of_deque(self, value: Any) -> bytes:
        return _hash("deque", self.of(value.maxlen), *map(self.of, value))

    def _pairs(self, pairs: Iterable[tuple[object, object]]) -> list[bytes]:
        return [self.of(key) + self.of(value) for key, value in pairs]

    def of_named(self, value: Any) -> bytes:
        return _hash("name", f"{value.__module__}.{value.__qualname__}".encode())

    def of_stream(self, value: Any) -> bytes:
        return _hash(type(value).__name__, self.of(value.getvalue()), self.of(value.tell()))

    def of_text(self, value: Any) -> bytes:
        return _hash(type(value).__name__, repr(value).encode("utf-8", "surrogatepass"))

    def _other(self, value: Any) -> bytes:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, enum.Enum):
            return _hash("Enum", self.of_named(type(value)), self.of(vars(value).get("_value_")))
        np: Any = sys.modules.get("numpy")
        if np is not None and isinstance(value, np.ndarray) and type(value) is np.ndarray:
            return self._array(value)
        if np is not None and isinstance(value, np.generic):
            return _hash("scalar", self.of_named(type(value)), self._array(np.asarray(value)))
        if np is not None and isinstance(value, np.dtype):
            return _hash("dtype", repr(value).encode())
        if isinstance(value, type):
            return self.of_named(value)
        return self._reduced(value)

    def _tensor(self, value: Any) -> bytes:
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
            return self._reduced(value)
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        described = repr((str(value.dtype), tuple(value.shape), value.requires_grad))
        return _hash(type(value).__name__, described.encode(), bytes_of(plain) if plain.numel() else b"")

    def _array(self, value: Any) -> bytes:
        described = repr((value.dtype, value.shape)).encode()
        if value.dtype.names is not None:
            return _hash("fields", described, *(self._array(value[name]) for name in value.dtype.names))
        if value.dtype.hasobject:
            return _hash("objects", described, *(self.of(value[at]) for at in _indices(value.shape)))
        data = value.tobytes()
        if value.dtype.char in "gG" and value.dtype.alignment > _X87:
            step = value.dtype.alignment
            data = b"".join(data[at : at + _X87] for at in range(0, len(data), step))
        return _hash("array", described, data)

    def _reduced(self, value: Any) -> bytes:
        """Describe an object by what makes it again."""
        cls = type(value)
        if classes.kind_of(cls) == "namedtuple":
            return _hash("namedtuple", self.of_named(cls), *map(self.of, value))
        reduce = copyreg.dispatch_table.get(cls)
        reduced: str | tuple[Any, ...] = reduce(value) if reduce is not None else value.__reduce_ex__(4)
        if isinstance(reduced, str):
            return _hash("global", cls.__module__.encode(), reduced.encode())
        made_by, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        parts = [self.of_named(cls), self._callable(made_by), self.of(arguments), self.of(state)]
        parts += [self.of(item) for item in items or ()]
        return _hash("object", *parts, b"pairs", *sorted(self._pairs(pairs or ())))

    def _callable(self, made_by: Any) -> bytes:
        name = getattr(made_by, "__qualname__", type(made_by).__qualname__)
        return _hash("callable", f"{getattr(made_by, '__module__', '')}.{name}".encode())


def _hash(kind: str, *parts: Any) -> bytes:
    found = hashlib.blake2b(kind.encode(), digest_size=_SIZE)
    for part in parts:
        found.update(struct.pack("<q", len(part)))
        found.update(part)
    return found.digest()


def _text(value: Any) -> bytes:
    if type(value) is int:
        return value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return bytes(value) if type(value) is bytes else repr(value).encode("utf-8", "surrogatepass")


def _indices(shape: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    import numpy as np  # noqa: PLC0415 - the array is numpy's

    return np.ndindex(shape)


_Digester = Callable[[_Digest, Any], bytes]
_TABLE: dict[type, _Digester] = {
    list: _Digest.of_series,
    tuple: _Digest.of_series,
    set: _Digest.of_set,
    frozenset: _Digest.of_set,
    dict: _Digest.of_dict,
    collections.Counter: _Digest.of_dict,
    collections.OrderedDict: _Digest.of_ordered,
    collections.defaultdict: _Digest.of_default,
    collections.deque: _Digest.of_deque,
    complex: _Digest.of_text,
    torch.Size: _Digest.of_series,
    io.BytesIO: _Digest.of_stream,
    io.StringIO: _Digest.of_stream,
    types.FunctionType: _Digest.of_named,
    types.BuiltinFunctionType: _Digest.of_named,
}
