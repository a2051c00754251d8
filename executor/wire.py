"""Messages between ranks, in the store that they share: typed JSON of a bounded size.

Whoever reaches that store may write to it. So a message is read as data, and never unpickled: its kind, its
version and every field are checked.
"""

from __future__ import annotations

import functools
import json
from typing import Any, Final, TypeVar

import pydantic

from cloudckpt.backends.errors import ExecutorError

_VERSION: Final = "cloudckpt-1"
MOST: Final = 1 << 20
"""Bytes of a message. torch's store itself takes values of up to 8 MiB."""

T = TypeVar("T")


def text(message: object) -> str:
    """Return a message as the store takes it.

    Args:
        message: a dataclass whose fields are plain values.

    Raises:
        ExecutorError: the message is longer than 1 MiB.
    """
    kind: Any = type(message)
    fields = _adapter(kind).dump_python(message, mode="json")
    body = json.dumps(fields, ensure_ascii=False).encode(errors="replace").decode()  # no lone surrogates
    if len(body) > MOST:
        raise ExecutorError(
            f"a {type(message).__name__} of {len(body)} bytes is too long for the store of the job"
        )
    return f"{_VERSION} {type(message).__name__} {body}"


def message(data: bytes, kind: type[T], key: str) -> T:
    """Return the message that `text` made.

    Args:
        data: the value in the store.
        kind: the class of the message.
        key: where the value was, for errors.

    Raises:
        ExecutorError: the value is something else.
    """
    if len(data) > MOST + len(_VERSION) + len(kind.__name__) + 2:
        raise _foreign(key, f"has {len(data)} bytes")
    version, _, rest = data.partition(b" ")
    name, _, body = rest.partition(b" ")
    if version != _VERSION.encode() or name != kind.__name__.encode():
        raise _foreign(key, f"is no {kind.__name__} of this version")
    try:
        of: Any = kind
        found: T = _adapter(of).validate_json(body, strict=True)
    except (ValueError, RecursionError) as error:
        raise _foreign(key, f"is no valid {kind.__name__}") from error
    return found


def _foreign(key: str, what: str) -> ExecutorError:
    return ExecutorError(
        f"the value of {key[:200]!r} in the store of the job {what}",
        hint="Another program may write to that store, or a rank may run another version of cloudckpt; "
        "the next call tries again",
    )


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)
