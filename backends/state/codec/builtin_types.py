"""Builders of the classes of Python's own and of its standard library."""

from __future__ import annotations

import collections
import datetime as dt
import decimal
import fractions
import importlib.resources
import importlib.util
import io
import pathlib
import re
import types
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any

from cloudckpt.backends.state.codec.arguments import Arguments, checked
from cloudckpt.backends.state.codec.keys import check_keys
from cloudckpt.backends.state.codec.malformed import MalformedError, NotHereError
from cloudckpt.backends.state.codec.tree import NOTHING, Global

FACTORIES: dict[str, type] = {
    **{
        f"builtins.{one.__name__}": one
        for one in (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
    },
    "collections.Counter": collections.Counter,
    "collections.OrderedDict": collections.OrderedDict,
    "collections.deque": collections.deque,
}
"""Classes that a defaultdict may call."""
CONSTANTS: dict[str, object] = {"builtins.Ellipsis": ..., "builtins.NotImplemented": NotImplemented}
ZONE = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+){0,3}")
"""A key of the time zone database, which is a path."""
NEWLINES = (None, "", "\n", "\r", "\r\n")
_OPEN_STATE = 3
"""State of a pickled BytesIO: bytes, position, attributes. A StringIO has its newline too."""


def _bytes(given: Arguments) -> bytes:
    """Make bytes of bytes alone: of a number they would be as many zeros."""
    return b"".join(checked(one, bytes) for one in given.bare(0, 1))


def _encoded(given: Arguments) -> bytes:
    """Return bytes as protocol 2 has them: as text of one character a byte."""
    text, encoding = given.bare(2)
    if encoding not in ("latin1", "latin-1"):
        raise MalformedError(f"bytes are encoded as {encoding!r}"[:100])
    encoded: bytes = checked(text, str).encode("latin-1")
    return encoded


def _bytearray(given: Arguments) -> bytearray:
    values = given.bare(0, 1, 2)
    return bytearray(_encoded(given) if len(values) == len(("text", "encoding")) else _bytes(given))


def _set(given: Arguments) -> set[Any]:
    (items,) = given.bare(1)
    return set(_keys(checked(items, list, tuple)))


def _frozenset(given: Arguments) -> frozenset[Any]:
    return frozenset(_keys([key for items in given.bare(0, 1) for key in checked(items, list, tuple)]))


def _keys(keys: list[Any]) -> list[Any]:
    check_keys(keys)
    return keys


def _complex(given: Arguments) -> complex:
    return complex(*(checked(one, float) for one in given.bare(2)))


def _range(given: Arguments) -> range:
    return range(*(checked(one, int) for one in given.bare(3)))


def _slice(given: Arguments) -> slice:
    return slice(*given.bare(3))


def _ordered_dict(given: Arguments) -> collections.OrderedDict[Any, Any]:
    if given.state not in (NOTHING, None, {}) or given.items or len(given.values) > 1:
        raise MalformedError("an OrderedDict has more than its items")
    pairs = [tuple(checked(pair, list, tuple)) for held in given.values for pair in checked(held, list)]
    _keys([key for key, _ in pairs])
    return collections.OrderedDict([*pairs, *given.pairs])


def _default_dict(given: Arguments) -> collections.defaultdict[Any, Any]:
    if given.state not in (NOTHING, None) or given.items or len(given.values) > 1:
        raise MalformedError("a defaultdict has more than its items and its factory")
    named = given.values[0] if given.values else None
    factory = FACTORIES[checked(named, Global).full_name] if named is not None else None
    return collections.defaultdict(factory, given.pairs)


def _counter(given: Arguments) -> collections.Counter[Any]:
    counter: collections.Counter[Any] = collections.Counter()
    for counts in given.bare(0, 1):
        dict.update(counter, checked(counts, dict))
    return counter


def _deque(given: Arguments) -> collections.deque[Any]:
    if given.state not in (NOTHING, None) or given.pairs or given.new:
        raise MalformedError("a deque has more than its items and its length")
    first: list[Any] = [*checked(given.values[0], list, tuple)] if given.values else []
    (longest,) = given.values[1:] or [None]
    if longest is not None and checked(longest, int) < len(first) + len(given.items):
        raise MalformedError("a deque has more items than it can hold")
    return collections.deque([*first, *given.items], longest)


def _namespace(given: Arguments) -> types.SimpleNamespace:
    if given.values or given.items or given.pairs:
        raise MalformedError("a SimpleNamespace has more than its attributes")
    made = types.SimpleNamespace()
    for name, value in ({} if given.state in (NOTHING, None) else checked(given.state, dict)).items():
        made.__dict__[checked(name, str)] = value
    return made


def _date(given: Arguments) -> dt.date:
    (packed,) = given.bare(1)
    return dt.date(checked(packed, bytes))  # type: ignore[call-arg]  # as pickle calls it


def _datetime(given: Arguments) -> dt.datetime:
    made: Any = dt.datetime
    packed, *zone = given.bare(1, 2)
    result: dt.datetime = made(checked(packed, bytes), *map(_zone, zone))
    return result


def _time(given: Arguments) -> dt.time:
    made: Any = dt.time
    packed, *zone = given.bare(1, 2)
    result: dt.time = made(checked(packed, bytes), *map(_zone, zone))
    return result


def _zone(zone: object) -> Any:
    return checked(zone, dt.timezone, zoneinfo.ZoneInfo, type(None))


def _timedelta(given: Arguments) -> dt.timedelta:
    return dt.timedelta(*(checked(one, int) for one in given.bare(3)))


def _timezone(given: Arguments) -> dt.timezone:
    offset, *name = given.bare(1, 2)
    return dt.timezone(checked(offset, dt.timedelta), *(checked(one, str) for one in name))


def _zone_info(given: Arguments) -> zoneinfo.ZoneInfo:
    key, cached = given.bare(2)
    if not ZONE.fullmatch(checked(key, str)):
        raise MalformedError(f"{key!r} is no time zone"[:100])
    if not _is_zone(key):
        raise NotHereError(
            f"the time zone {key!r} is not in this machine's database", "Install the package tzdata"
        )
    return zoneinfo.ZoneInfo(key) if cached else zoneinfo.ZoneInfo.no_cache(key)


def _is_zone(key: str) -> bool:
    """Return True if there is such a zone. `ZoneInfo` itself would import what the key says."""
    if any((pathlib.Path(folder) / key).is_file() for folder in zoneinfo.TZPATH):
        return True
    if importlib.util.find_spec("tzdata") is None:
        return False
    return importlib.resources.files("tzdata").joinpath("zoneinfo", key).is_file()


def _decimal(given: Arguments) -> decimal.Decimal:
    (text,) = given.bare(1)
    return decimal.Decimal(checked(text, str))


def _fraction(given: Arguments) -> fractions.Fraction:
    values = given.bare(1, 2)
    if len(values) == 1:  # as Python 3.10 has it
        numerator, _, denominator = checked(values[0], str).partition("/")
        values = [int(numerator), int(denominator or 1)]
    return fractions.Fraction(*(checked(one, int) for one in values))


def _path(cls: type[pathlib.PurePath]) -> Callable[[Arguments], pathlib.PurePath]:
    def build(given: Arguments) -> pathlib.PurePath:
        return cls(*(checked(part, str) for part in given.only()))

    return build


def _uuid(given: Arguments) -> uuid.UUID:
    state = checked(given.of_new_object(), dict)
    if not state.keys() <= {"int", "is_safe"}:
        raise MalformedError("a UUID has more than its number")
    safe = uuid.SafeUUID(checked(state.get("is_safe"), int, type(None)))
    return uuid.UUID(int=checked(state.get("int"), int), is_safe=safe)


def _bytes_io(given: Arguments) -> io.BytesIO:
    content, at, attributes = _opened(given, _OPEN_STATE)
    made = io.BytesIO(checked(content, bytes))
    _check_open(len(content), at, attributes)
    made.seek(at)
    return made


def _string_io(given: Arguments) -> io.StringIO:
    content, newline, at, attributes = _opened(given, _OPEN_STATE + 1)
    if checked(newline, str, type(None)) not in NEWLINES:
        raise MalformedError("a StringIO has an unknown newline")
    _check_open(len(checked(content, str)), at, attributes)
    made: Any = io.StringIO()
    made.__setstate__((content, newline, at, None))  # its constructor would translate newlines once more
    stream: io.StringIO = made
    return stream


def _opened(given: Arguments, count: int) -> Any:
    state = checked(given.of_new_object(), tuple)
    if len(state) != count:
        raise MalformedError("the state of a stream is not what pickle has of one")
    return state


def _check_open(length: int, at: object, attributes: object) -> None:
    if not 0 <= checked(at, int) <= length or attributes not in (None, {}):
        raise MalformedError("a stream has a position outside, or attributes")


_PATHS = [pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath]

BUILDERS: dict[str, Callable[[Arguments], object]] = {
    "builtins.bytes": _bytes,
    "_codecs.encode": _encoded,
    "builtins.bytearray": _bytearray,
    "builtins.set": _set,
    "builtins.frozenset": _frozenset,
    "builtins.complex": _complex,
    "builtins.range": _range,
    "builtins.slice": _slice,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "collections.Counter": _counter,
    "collections.deque": _deque,
    "types.SimpleNamespace": _namespace,
    "datetime.date": _date,
    "datetime.datetime": _datetime,
    "datetime.time": _time,
    "datetime.timedelta": _timedelta,
    "datetime.timezone": _timezone,
    "zoneinfo.ZoneInfo._unpickle": _zone_info,
    "decimal.Decimal": _decimal,
    "fractions.Fraction": _fraction,
    "uuid.UUID": _uuid,
    "_io.BytesIO": _bytes_io,
    "_io.StringIO": _string_io,
    # Python 3.13 says that they live in `pathlib._local`.
    **{f"{module}.{cls.__name__}": _path(cls) for cls in _PATHS for module in ("pathlib", "pathlib._local")},
}
NAMED = frozenset(FACTORIES)
