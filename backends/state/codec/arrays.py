"""Builders of numpy's arrays, scalars and dtypes, and checks of those that are to be saved.

numpy is imported when a value needs it. A dtype is built from the description that its pickle has, an array
from its bytes; no ``__setstate__`` of numpy's is given what a checkpoint says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from cloudckpt.backends.state.codec.arguments import Arguments, checked
from cloudckpt.backends.state.codec.malformed import MalformedError
from cloudckpt.backends.state.codec.tree import NOTHING, Global

_CODE = re.compile(r"(?:[biufcSUVMmO][0-9]{0,10}|\?)")
_UNIT = re.compile(r"Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as|generic")
_ORDERS = ("<", ">", "|", "=")
_ALIGNED = 0x80
"""Among the flags of a dtype: its fields are where a C compiler would put them."""
_VERSIONS = (3, 4)
"""Of a dtype's state. The second has metadata, and the unit of a time."""
_MOST_DIMENSIONS = 64
_LAST = 23
"""The number of float16: what has a higher one was registered by others, or has its elements elsewhere."""
LARGEST = (1 << 31) - 1
"""Bytes of an array. Protocol 2 has bytes as text, of 4 GiB at most, in which half of them take two."""
_SIMPLE = "biufcSUVMm"
"""Kinds of numbers, text, bytes and times: their elements are bytes."""


def problem_of_dtype(dtype: Any) -> str | None:
    """Return why a dtype would not be restored exactly, or None where it would."""
    np = _numpy()
    if dtype.metadata:
        return "its dtype has metadata, which numpy drops"
    if dtype.subdtype is None and dtype.names is None:
        if dtype == np.dtype(object):
            return None
        if dtype.num <= _LAST and dtype.kind in _SIMPLE:
            return None
        return f"its dtype {dtype} is not one of numpy's own"
    if dtype.hasobject:
        return "its dtype has objects in fields"
    if dtype.names is not None and dtype.type is not np.void:
        return f"its elements are {dtype.type.__name__} objects"
    inner = [dtype.base] if dtype.names is None else [dtype.fields[name][0] for name in dtype.names]
    problem = next((found for one in inner if (found := problem_of_dtype(one)) is not None), None)
    if problem is None and not _is_rebuilt(dtype):
        return f"its dtype {dtype} can't be built from its description"
    return problem


def _is_rebuilt(dtype: Any) -> bool:
    """Return True if a dtype is the same when it is built again."""
    made_by, arguments, state = dtype.__reduce__()
    del made_by
    try:
        again = _dtype(Arguments([*arguments], state, [], [], new=False))
    except (MalformedError, TypeError, ValueError):
        return False
    return bool(
        again == dtype
        and again.fields == dtype.fields
        and again.alignment == dtype.alignment
        and again.isalignedstruct == dtype.isalignedstruct
    )


def problem_of_array(array: Any) -> str | None:
    """Return why an array would not be restored exactly, or None where it would: its elements apart."""
    problem = problem_of_dtype(array.dtype)
    if problem is None and not array.dtype.itemsize:
        return "its elements have no bytes"
    if problem is None and array.dtype.names is None and not array.dtype.isnative:
        return "it is not in this machine's byte order, into which numpy turns what it unpickles"
    return problem


def problem_of_scalar(scalar: Any) -> str | None:
    """Return why a scalar would not be restored exactly, or None where it would."""
    np = _numpy()
    if type(scalar) in (np.str_, np.bytes_):
        last = scalar[-1:]
        return "numpy drops the zeros at its end" if last in ("\0", b"\0") else None
    if scalar.dtype.hasobject:
        return "its dtype has objects in fields"
    if type(scalar) is not np.void and np.dtype(scalar.dtype.str).type is not type(scalar):
        return f"numpy restores it as a {np.dtype(scalar.dtype.str).type.__name__}"
    return problem_of_array(scalar)


def _numpy() -> Any:
    import numpy as np  # noqa: PLC0415 - few checkpoints have anything of numpy's

    return np


# --- building


def _dtype(given: Arguments) -> Any:
    code, *_ = given.values
    if given.items or given.pairs or not _CODE.fullmatch(checked(code, str)):
        raise MalformedError(f"{code!r} is no dtype"[:100])
    return _described(code, () if given.state is NOTHING else checked(given.state, tuple))


def _described(code: str, state: tuple[Any, ...]) -> Any:
    np = _numpy()
    if not state:
        return np.dtype(code)
    if len(state) not in (8, 9) or state[0] not in _VERSIONS or state[1] not in _ORDERS:
        raise MalformedError("the state of a dtype is not what numpy has of one")
    _, order, inner, names, fields, itemsize, alignment, flags, *more = state
    unit = _unit(code, more)
    if inner is not None:
        base, shape = checked(inner, tuple)
        made = np.dtype((_checked_dtype(base), _shape(shape)))
    elif names is not None:
        aligned = bool(checked(flags, int) & _ALIGNED)
        made = _structured(checked(names, tuple), checked(fields, dict), itemsize, aligned=aligned)
    elif order in ("<", ">") and code[0] not in "SV":
        made = np.dtype(f"{order}{code}{unit}")
    else:
        made = np.dtype(f"{code}{unit}")
    if (inner is not None or names is not None) and f"V{made.itemsize}" != code:
        raise MalformedError("a dtype claims another size than it has")
    if names is not None and alignment != made.alignment:
        raise MalformedError("a dtype claims another alignment than it has")
    return made


def _unit(code: str, more: list[Any]) -> str:
    """Return the unit of a time as a dtype's description has it, such as ``[25ns]``."""
    if code[0] not in "Mm" or not more:
        if any(more):
            raise MalformedError("a dtype has metadata")
        return ""
    metadata, unit_fields = checked(more[0], tuple)
    unit, count, divisor, *_ = checked(unit_fields, tuple)
    name = checked(unit, bytes).decode("ascii")
    if metadata or not _UNIT.fullmatch(name) or checked(divisor, int) != 1 or checked(count, int) < 1:
        raise MalformedError("a dtype has metadata, or no unit that there is")
    return "" if name == "generic" else f"[{count}{name}]"


def _structured(names: tuple[Any, ...], fields: dict[Any, Any], itemsize: Any, *, aligned: bool) -> Any:
    described = [checked(fields[name], tuple) for name in names]
    titles = [one[2] if len(one) == len(("dtype", "offset", "title")) else None for one in described]
    description: dict[str, Any] = {
        "names": [checked(name, str) for name in names],
        "formats": [_checked_dtype(one[0]) for one in described],
        "offsets": [checked(one[1], int) for one in described],
        "itemsize": checked(itemsize, int),
    }
    if any(title is not None for title in titles):
        description["titles"] = [checked(title, str, type(None)) for title in titles]
    made: Any = _numpy().dtype(description, align=aligned)
    return made


def _checked_dtype(dtype: Any) -> Any:
    if not isinstance(dtype, _numpy().dtype):
        raise MalformedError("something other than a dtype is where one belongs")
    return dtype


def _shape(shape: object) -> tuple[int, ...]:
    sizes: tuple[Any, ...] = checked(shape, tuple)
    if len(sizes) > _MOST_DIMENSIONS or not all(type(one) is int and 0 <= one < 1 << 63 for one in sizes):
        raise MalformedError("an array has a shape that no array has")
    return sizes


def _array(given: Arguments) -> Any:
    """Build what ``ndarray.__reduce__`` describes: an empty array and the state that it is given."""
    kind, empty, code = given.values if len(given.values) == len(("class", "shape", "code")) else (None,) * 3
    of_numpy = isinstance(kind, Global) and kind.full_name == "numpy.ndarray"
    if not of_numpy or empty != (0,) or code not in (b"b", "b") or given.items or given.pairs:
        raise MalformedError("an array is made in no way that numpy makes one")
    state = checked(given.state, tuple)
    if len(state) != len(("version", "shape", "dtype", "order", "data")) or state[0] != 1:
        raise MalformedError("the state of an array is not what numpy has of one")
    _, shape, dtype, fortran, data = state
    order = "F" if checked(fortran, bool, int) else "C"
    if type(data) is list:
        return _array_of_objects(data, _shape(shape), _checked_dtype(dtype), order)
    return _array_of_bytes(checked(data, bytes, bytearray), _shape(shape), _checked_dtype(dtype), order)


def _array_from_buffer(given: Arguments) -> Any:
    """Build what protocol 5 has of an array."""
    data, dtype, shape, order = given.bare(4)
    if order not in ("C", "F"):
        raise MalformedError("an array has an unknown order")
    return _array_of_bytes(checked(data, bytes, bytearray), _shape(shape), _checked_dtype(dtype), order)


def _array_of_bytes(data: bytes | bytearray, shape: tuple[int, ...], dtype: Any, order: str) -> Any:
    np = _numpy()
    if dtype.hasobject or dtype.subdtype is not None or not dtype.itemsize:
        raise MalformedError("an array of bytes is of objects, or of nothing")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise MalformedError(f"an array of shape {shape} has {len(data):,} bytes"[:200])
    held: Any = np.ndarray(shape, dtype, buffer=bytes(data), order=order)
    return held.copy(order)  # with memory of its own, that can be written to


def _array_of_objects(items: list[Any], shape: tuple[int, ...], dtype: Any, order: str) -> Any:
    np = _numpy()
    if dtype != np.dtype(object) or math.prod(shape) != len(items):
        raise MalformedError("an array of objects has more or fewer of them than places, or another dtype")
    flat: Any = np.empty(len(items), dtype=object)
    for at, item in enumerate(items):
        flat[at] = item
    return flat.reshape(shape).copy(order)


def _scalar(given: Arguments) -> Any:
    np = _numpy()
    description, data = given.bare(2)
    dtype = _checked_dtype(description)
    if dtype.hasobject or dtype.subdtype is not None or dtype.itemsize != len(checked(data, bytes)):
        raise MalformedError("a scalar has more or fewer bytes than its dtype")
    if not dtype.itemsize:
        return dtype.type()
    scalar = np.ndarray((), dtype, buffer=data)[()]
    return scalar.copy() if type(scalar) is np.void else scalar


def _names(module: str, name: str, builder: Callable[[Arguments], object]) -> dict[str, Any]:
    """Return a builder under numpy 1's name and under numpy 2's."""
    return {f"numpy.{core}.{module}.{name}": builder for core in ("core", "_core")}


BUILDERS: dict[str, Callable[[Arguments], object]] = {
    "numpy.dtype": _dtype,
    **_names("multiarray", "_reconstruct", _array),
    **_names("multiarray", "scalar", _scalar),
    **_names("numeric", "_frombuffer", _array_from_buffer),
}
NAMED = frozenset({"numpy.ndarray"})
