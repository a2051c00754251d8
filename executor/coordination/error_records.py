"""Errors as data, on their way to other ranks: class, arguments, fields and notes, and nothing to run.

An error is made again from an exception class that the reading process has imported, without the class's own
constructor unless that is built in or this library's. What is not plain data does not travel.
"""

from __future__ import annotations

import base64
import builtins
import json
import sys
import traceback
from collections.abc import Iterator
from typing import Any, Final

from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.backends.errors import CheckpointError

_OURS: Final = "cloudckpt."
_DEPTH: Final = 12
_TEXT: Final = 64 << 10
"""Characters of one text; more are cut off."""
_MOST: Final = 768 << 10
"""Bytes of a record: it fits into a message of the store."""
_EXACT: Final = (1 << 63) - 1


class NotPlainError(Exception):
    """An error holds what is not plain data, or too much of it."""


def packed(error: BaseException, notes: tuple[str, ...]) -> bytes:
    """Return the record of an error.

    Raises:
        NotPlainError: the error can't be made again from plain data.
    """
    data = json.dumps({"error": _record(error, 0), "notes": [note[:_TEXT] for note in notes]}).encode()
    if len(data) > _MOST:
        raise NotPlainError
    return data


def unpacked(data: bytes) -> tuple[BaseException, tuple[str, ...]]:
    """Return the error of a record, and its notes.

    Raises:
        ValueError, LookupError, TypeError, RecursionError: the data are no record.
    """
    if len(data) > _MOST:
        raise ValueError(f"a record of {len(data)} bytes")
    record = json.loads(data)
    notes = record["notes"]
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise TypeError("notes that are no text")
    return _error(record["error"], 0), tuple(notes)


def _record(error: BaseException, depth: int) -> dict[str, Any]:
    cls = type(error)
    where = f"{cls.__module__}:{cls.__qualname__}"
    if depth > _DEPTH or _class(where) is not cls:
        raise NotPlainError
    record: dict[str, Any] = {"class": where}
    if isinstance(error, CheckpointException):
        failures = {str(rank): _record(one, depth + 1) for rank, (one, _) in error.failures.items()}
        return {**record, "what": error.args[0] if error.args else "", "failures": failures}
    fields = {str(name): value for name, value in vars(error).items() if name != "__notes__"}
    args = error.args
    if cls.__module__ == builtins.__name__:  # an OSError tells its file's name by its way of pickling alone
        args = error.__reduce__()[1]  # type: ignore[assignment]
    record["args"] = [_plain(value, depth + 1) for value in args]
    record["fields"] = {name: _plain(value, depth + 1) for name, value in fields.items()}
    return record


def _error(record: Any, depth: int) -> BaseException:
    cls = _class(record["class"])
    if cls is None or depth > _DEPTH:
        raise LookupError(f"no exception class {str(record['class'])[:200]!r} here")
    if issubclass(cls, CheckpointException):
        frames = traceback.StackSummary()  # of another process
        failures = {int(rank): _error(one, depth + 1) for rank, one in record["failures"].items()}
        return CheckpointException(
            str(record["what"]), {rank: (one, frames) for rank, one in failures.items()}
        )
    args = tuple(_value(value, depth + 1) for value in record["args"])
    fields = {str(name): _value(value, depth + 1) for name, value in record["fields"].items()}
    if cls.__module__ == builtins.__name__:
        error: BaseException = cls(*args)
    elif cls.__module__.startswith(_OURS) and issubclass(cls, CheckpointError):
        error = cls(str(args[0]) if args else "")
    else:
        error = next(_built_in(cls)).__new__(cls, *args)
        error.args = args
    vars(error).update(fields)
    return error


def _built_in(cls: type[BaseException]) -> Iterator[Any]:
    """Yield the classes that come with Python among those that a class derives from, the nearest first."""
    return (one for one in cls.__mro__ if one.__module__ == builtins.__name__)


def _class(where: Any) -> type[BaseException] | None:
    """Return an exception class that this process has imported; None for anything else."""
    module, _, name = str(where).partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    is_error = isinstance(found, type) and issubclass(found, (Exception, CheckpointException))
    return found if is_error else None


def _plain(value: Any, depth: int) -> Any:
    """Return a value as JSON: text, numbers and nothing as they are, everything else with its kind."""
    if depth > _DEPTH:
        raise NotPlainError
    match value:
        case None | bool():
            return value
        case str() if type(value) is str:
            return value[:_TEXT]
        case int() if type(value) is int and abs(value) <= _EXACT:
            return value
        case float() if type(value) is float:
            return {"float": value.hex()}
        case bytes() if len(value) <= _TEXT:
            return {"bytes": base64.b64encode(value).decode()}
        case list() | tuple() if type(value) in (list, tuple):
            return {type(value).__name__: [_plain(one, depth + 1) for one in value]}
        case dict() if type(value) is dict:
            return {"dict": [[_plain(k, depth + 1), _plain(v, depth + 1)] for k, v in value.items()]}
        case BaseException():
            return {"error": _record(value, depth + 1)}
        case _:
            raise NotPlainError


def _value(value: Any, depth: int) -> Any:
    if depth > _DEPTH:
        raise ValueError("a record nested too deep")
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise TypeError("a list without its kind")
        return value
    ((kind, held),) = value.items()
    match kind:
        case "float":
            return float.fromhex(held)
        case "bytes":
            return base64.b64decode(held, validate=True)
        case "list":
            return [_value(one, depth + 1) for one in held]
        case "tuple":
            return tuple(_value(one, depth + 1) for one in held)
        case "dict":
            return {_value(key, depth + 1): _value(one, depth + 1) for key, one in held}
        case "error":
            return _error(held, depth + 1)
        case _:
            raise ValueError(f"no kind of value: {str(kind)[:100]}")
