"""Check part by part that a value is restored exactly by a fresh process.

The check goes by exact classes, and runs nothing of the value's own but the ``__reduce_ex__`` of Enums and
dataclasses: it costs little in the time that training is blocked. It accepts what the builders in `codec`
build again.
"""

from __future__ import annotations

import collections
import copyreg
import datetime as dt
import decimal
import enum
import fractions
import io
import pathlib
import types
import uuid
import zoneinfo
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch

from cloudckpt.backends.state.codec import builtin_types, classes
from cloudckpt.backends.state.codec.keys import check_keys
from cloudckpt.backends.state.codec.malformed import MalformedError
from cloudckpt.backends.state.foreign import foreign_problem
from cloudckpt.backends.state.hints import hint_for

DEPTH: Final = 200
"""Levels of nesting. Pickling recurses, and Python allows it some 1,000."""
_DEEP = 3
"""Levels that an object takes which pickles as a call, with what that is given."""
_KEY_NODES = 900
_NODES = 100
_SMALL = 10_000
"""Limits of `cloudckpt.backends.format.pickle_limits`, under which every value that is accepted must stay."""
_OBJECT = 32
"""Nodes that a small object has in a pickle, at most."""
_LONG = 1 << 30
"""Characters, bytes or bits from which text, bytes and numbers are measured."""
_LONGEST = (1 << 32) - 1
"""Bytes of text that protocol 2 can have. It has bytes as text, in which half of them take two."""
_LONGEST_NUMBER = 8 * ((1 << 31) - 1)
_PROTOCOL = 2
_NEW: Final[Callable[..., Any]] = copyreg.__newobj__  # type: ignore[attr-defined]  # typeshed lacks it
_PATH = 60
"""Characters of a key in a path."""
UNKNOWN: Final = "its class is not one that a load can build without running code"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A part of a value that would not be restored exactly."""

    path: str
    """Path inside the value, such as ``[2].x``; empty for the value itself."""
    class_name: str
    """Its class, with its module."""
    reason: str
    hint: str
    """Advice on what to save instead."""


class RefusedError(Exception):
    """A part can't be restored exactly."""

    def __init__(
        self, path: str, value: object, reason: str, hint: str | None = None, *, lossy: bool = False
    ) -> None:
        super().__init__(reason)
        cls = type(value)
        self.value = value
        self.lossy = lossy
        """Pickling it succeeds, and changes it."""
        name = f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")
        self.refusal = Refusal(path, name, reason, hint or hint_for(value))


ATOMS: Final = frozenset({bool, int, float, complex, str, bytes, type(None)})
_FLAT = frozenset({bool, float, type(None)})


class Check:
    """One value, checked part by part. Sizes are nodes of its pickle, at most.

    Args:
        try_out: pickles and unpickles a part that is not known here. It returns None where that succeeds, the
            reason where it fails, and `UNKNOWN` where it is not allowed to.
        any_key: accepts keys with any hash function.
    """

    def __init__(self, try_out: Callable[[object], str | None], *, any_key: bool) -> None:
        self._try_out = try_out
        self._any_key = any_key
        self._count = 0
        """Parts, each counted once: fewer than the pickle has bytes."""
        self._sizes: dict[int, int | None] = {}
        """Of the parts seen, by identity. None for those that the check is inside of."""

    def run(self, value: object) -> Refusal | None:
        """Return the first part that would not be restored exactly, or None."""
        try:
            if self.size(value, "", 0) > _NODES * max(_SMALL, self._count):
                raise RefusedError(
                    "", value, "it refers to the same tuples too often", "Save each tuple once"
                )
        except RefusedError as error:
            return error.refusal
        except RecursionError:
            return RefusedError("", value, "it is nested too deeply", "Save it in fewer levels").refusal
        return None

    def size(self, value: object, path: str, depth: int) -> int:
        """Check a part and return its size.

        Raises:
            RefusedError: it would not be restored exactly.
        """
        cls = type(value)
        if cls in ATOMS:
            self._count += 1
            return _atom(value, path)
        known = self._sizes.get(id(value), 0)
        if known is None:
            raise RefusedError(path, value, "it holds itself", "Save its parts apart from each other")
        if known:
            return known
        self._count += 1
        self._sizes[id(value)] = None
        try:
            if depth > DEPTH:
                raise RefusedError(path, value, f"it is nested in {DEPTH} others", "Save it in fewer levels")
            size = _TABLE.get(cls, Check._other)(self, value, path, depth)
        except RefusedError as error:
            if error.value is not value or error.lossy:
                raise
            problem = self._try_out(value)
            if problem == UNKNOWN:
                raise
            if problem is not None:
                raise RefusedError(path, value, problem) from None
            size = _OBJECT
        self._sizes[id(value)] = size
        return size

    def _series(self, values: Any, path: str, depth: int) -> int:
        """Check items that are known by their position."""
        kinds = set(map(type, values))
        if kinds <= _FLAT or (kinds == {int} and min(values) > -_LONG and max(values) < _LONG):
            self._count += len(values)
            return len(values)
        return sum(
            self.size(value, path if type(value) in _FLAT else f"{path}[{at}]", depth)
            for at, value in enumerate(values)
        )

    def of_list(self, value: Any, path: str, depth: int) -> int:
        self._series(value, path, depth + 1)
        return 1

    def of_tuple(self, value: Any, path: str, depth: int) -> int:
        return 1 + self._series(value, path, depth + 1)

    def of_deque(self, value: Any, path: str, depth: int) -> int:
        self._series(value, path, depth + _DEEP)
        return _OBJECT

    def of_set(self, value: Any, path: str, depth: int) -> int:
        for element in value:
            self._key(element, path, depth + _DEEP)
        return _OBJECT

    def of_dict(self, value: Any, path: str, depth: int) -> int:
        self._items(value.items(), path, depth + 1)
        return 1

    def of_ordered(self, value: Any, path: str, depth: int) -> int:
        if getattr(value, "__dict__", None):
            raise RefusedError(path, value, "it has attributes", "Save them beside it", lossy=True)
        self._items(value.items(), path, depth + _DEEP)
        return _OBJECT

    def of_default(self, value: Any, path: str, depth: int) -> int:
        factory = value.default_factory
        if factory is not None and factory not in builtin_types.FACTORIES.values():
            known = ", ".join(sorted(one.__name__ for one in builtin_types.FACTORIES.values()))
            raise RefusedError(
                f"{path}.default_factory", factory, "it is not a factory that can be restored",
                f"Use one of {known}, or save a dict",
            )  # fmt: skip
        self._items(value.items(), path, depth + _DEEP)
        return _OBJECT

    def _items(self, pairs: Iterable[tuple[object, object]], path: str, depth: int) -> None:
        for key, value in pairs:
            self._key(key, path, depth)
            self.size(value, path if type(value) in _FLAT else f"{path}[{shown(key)}]", depth)

    def _attributes(self, pairs: Iterable[tuple[str, object]], path: str, depth: int) -> int:
        """Check values that are known by a name."""
        return sum(self.size(value, f"{path}.{name}", depth) for name, value in pairs)

    def _key(self, key: object, path: str, depth: int) -> None:
        """Check a key of a dict or an element of a set."""
        place = path if type(key) in _FLAT else f"{path}[{shown(key)}]"
        size = self.size(key, place, depth)
        if self._any_key:
            return
        if size > _KEY_NODES:
            raise RefusedError(place, key, "it is a key with too many parts", "Use text or a number as a key")
        try:
            check_keys([key])
        except MalformedError:
            raise RefusedError(
                place,
                key,
                "it is a key whose hash is its own, or does not last",
                "Use text or a number as a key",
            ) from None

    def of_leaf(self, *_: object) -> int:
        return _OBJECT

    def of_range(self, value: Any, path: str, depth: int) -> int:
        return 8 + self._attributes(
            [("start", value.start), ("stop", value.stop), ("step", value.step)], path, depth + _DEEP
        )

    def of_clock(self, value: Any, path: str, depth: int) -> int:
        if value.tzinfo is not None and type(value.tzinfo) not in (dt.timezone, zoneinfo.ZoneInfo):
            raise RefusedError(
                f"{path}.tzinfo", value.tzinfo, UNKNOWN, "Use datetime.timezone or zoneinfo.ZoneInfo"
            )
        return _OBJECT + self.size(value.tzinfo, f"{path}.tzinfo", depth)

    def of_zone(self, value: Any, path: str, _: int) -> int:
        if value.key is None or not builtin_types.ZONE.fullmatch(value.key):
            raise RefusedError(path, value, "it has no key", "Make it with ZoneInfo(key)")
        return _OBJECT

    def of_path(self, value: Any, *_: object) -> int:
        return _OBJECT + len(value.parts)

    def of_namespace(self, value: Any, path: str, depth: int) -> int:
        self._attributes(_named(vars(value), path, value), path, depth + _DEEP)
        return _OBJECT

    def of_stream(self, value: Any, path: str, depth: int) -> int:
        if value.closed:
            raise RefusedError(path, value, "it is closed", "Leave it out")
        content, at = value.getvalue(), value.tell()
        if at > len(content) or vars(value):
            raise RefusedError(path, value, "it has attributes, or a position after its end")
        if isinstance(value, io.StringIO):
            again: Any = io.StringIO()
            again.__setstate__(value.__getstate__())
            if again.newlines != value.newlines:
                raise RefusedError(path, value, "it has translated newlines", lossy=True)
        return _OBJECT + self.size(content, path, depth)

    # --- classes that are known by what they derive from

    def _other(self, value: Any, path: str, depth: int) -> int:
        if (found := foreign_problem(value)) is not None:
            if found.reason is not None:
                raise RefusedError(path, value, found.reason, found.hint, lossy=found.lossy)
            for name, part in found.parts:
                self.size(part, f"{path}{name}", depth + _DEEP)
            return _OBJECT
        cls = type(value)
        kind = classes.kind_of(cls)
        if kind is None or cls in copyreg.dispatch_table:
            raise RefusedError(path, value, UNKNOWN)
        if (problem := classes.unreachable(cls)) is not None:
            hint = "Move the class to a module of its own, which is imported before the load"
            raise RefusedError(path, value, problem, hint)
        try:
            return self._of_users(kind, value, path, depth)
        except (classes.ChangedClassError, MalformedError) as error:
            raise RefusedError(path, value, str(error)) from None

    def _of_users(self, kind: classes.Kind, value: Any, path: str, depth: int) -> int:
        cls = type(value)
        if kind == "namedtuple":
            return 8 + self._attributes(zip(cls._fields, value, strict=True), path, depth + _DEEP)
        reduced = value.__reduce_ex__(_PROTOCOL)
        if kind == "Enum":
            if not _is_member(value, reduced):
                raise RefusedError(path, value, "it is not found again by its value", "Save its name")
            return _OBJECT
        made_by, arguments, state, *more = reduced if isinstance(reduced, tuple) else (None, (), None)
        if made_by is not _NEW or arguments != (cls,) or any(one is not None for one in more):
            raise RefusedError(path, value, "it pickles in a way of its own")
        self._attributes(classes.fields_in(cls, state).items(), path, depth + _DEEP)
        return _OBJECT


def _is_member(value: enum.Enum, reduced: Any) -> bool:
    """Return True if an Enum's member pickles as its class and its value or name."""
    cls = type(value)
    match reduced:
        case (made_by, (content,)) if made_by is cls:
            return classes.is_plain(content) and classes.member_of(cls, content) is value
        case (made_by, (owner, str(name))) if made_by is getattr and owner is cls:
            return classes.member_named(cls, name) is value
        case _:
            return False


def _named(attributes: dict[Any, object], path: str, value: object) -> Iterable[tuple[str, object]]:
    if not all(type(name) is str for name in attributes):
        raise RefusedError(path, value, "it has an attribute whose name is no text")
    return attributes.items()


def _atom(value: Any, path: str) -> int:
    """Return the size of a number, text, bytes or None."""
    cls = type(value)
    if cls is int:
        bits = value.bit_length()
        if bits > _LONGEST_NUMBER:
            raise RefusedError(path, value, "it has more digits than a pickle can have")
        return 1 + int(bits >> 6)
    if cls is not str and cls is not bytes:
        return 8
    if len(value) >= _LONG:
        length = len(value.encode("utf-8", "surrogatepass")) if cls is str else 2 * len(value)
        if length > _LONGEST:
            raise RefusedError(
                path, value, "it is longer than a pickle can have", "Save it as a uint8 tensor"
            )
    return 1 if cls is str else 8


def shown(key: object) -> str:
    """Return a key as a path has it."""
    text = repr(key)
    return text if len(text) <= _PATH else f"{text[:_PATH]}…"


_Checker = Callable[[Check, Any, str, int], int]
_TABLE: dict[type, _Checker] = {
    list: Check.of_list,
    tuple: Check.of_tuple,
    dict: Check.of_dict,
    set: Check.of_set,
    frozenset: Check.of_set,
    collections.deque: Check.of_deque,
    collections.OrderedDict: Check.of_ordered,
    collections.Counter: Check.of_ordered,
    collections.defaultdict: Check.of_default,
    bytearray: Check.of_leaf,
    range: Check.of_range,
    slice: Check.of_range,
    type(...): Check.of_leaf,
    type(NotImplemented): Check.of_leaf,
    types.SimpleNamespace: Check.of_namespace,
    dt.date: Check.of_leaf,
    dt.timedelta: Check.of_leaf,
    dt.timezone: Check.of_leaf,
    dt.datetime: Check.of_clock,
    dt.time: Check.of_clock,
    zoneinfo.ZoneInfo: Check.of_zone,
    decimal.Decimal: Check.of_leaf,
    fractions.Fraction: Check.of_leaf,
    uuid.UUID: Check.of_leaf,
    **dict.fromkeys(
        (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.WindowsPath, pathlib.PureWindowsPath),
        Check.of_path,
    ),
    io.BytesIO: Check.of_stream,
    io.StringIO: Check.of_stream,
    torch.dtype: Check.of_leaf,
    torch.device: Check.of_leaf,
    torch.layout: Check.of_leaf,
    torch.Size: Check.of_leaf,
}
