"""Messages between ranks: typed JSON of a bounded size.

Any process that reaches the store of the ranks may write to it, and may take the place of a rank in a group.
A message is read as data, and never unpickled: its kind, its version and every field are checked.
"""

from __future__ import annotations

import functools
import json
from typing import Any, Final, TypeVar

import pydantic

from cloudckpt.backends.errors import ExecutorError

_VERSION: Final = "cloudckpt-1"
MOST: Final = 1 << 20
"""Bytes of a message in the store. torch's store itself takes values of up to 8 MiB."""
MOST_SENT: Final = 1 << 30
"""Bytes of a message in a collective: the digests of a few million tensors."""

T = TypeVar("T")


def text(message: object, most: int = MOST) -> str:
    """Return a message as the store takes it.

    Args:
        message: a dataclass whose fields are plain values.
        most: bytes that it may have.

    Raises:
        ExecutorError: the message is longer.
    """
    kind: Any = type(message)
    fields = _adapter(kind).dump_python(message, mode="json")
    body = json.dumps(fields, ensure_ascii=False).encode(errors="replace").decode()  # no lone surrogates
    if len(body) > most:
        raise ExecutorError(
            f"a {type(message).__name__} of {len(body)} bytes is too long for the other ranks"
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
    return _read(data, kind, f"the value of {key[:200]!r} in the store of the job", MOST)


def packed(message: object) -> bytes:
    """Return a message as a collective takes it.

    Raises:
        ExecutorError: the message is longer than 1 GiB.
    """
    return text(message, MOST_SENT).encode()


def sent(data: bytes, kind: type[T], rank: int) -> T:
    """Return the message that `packed` made for a collective.

    Args:
        data: what the collective returned.
        kind: the class of the message.
        rank: the rank that sent it, for errors.

    Raises:
        ExecutorError: the data is something else.
    """
    return _read(data, kind, f"what rank {rank} sent", MOST_SENT)


def _read(data: bytes, kind: type[T], where: str, most: int) -> T:
    if len(data) > most + len(_VERSION) + len(kind.__name__) + 2:
        raise foreign(where, f"has {len(data)} bytes")
    version, _, rest = data.partition(b" ")
    name, _, body = rest.partition(b" ")
    if version != _VERSION.encode() or name != kind.__name__.encode():
        raise foreign(where, f"is no {kind.__name__} of this version")
    try:
        of: Any = kind
        found: T = _adapter(of).validate_json(body, strict=True)
    except (ValueError, RecursionError) as error:
        raise foreign(where, f"is no valid {kind.__name__}") from error
    return found


def foreign(where: str, what: str) -> ExecutorError:
    """Return the error of a message that no rank of this job has sent.

    Args:
        where: the message, as the subject of a sentence.
        what: the rest of the sentence.
    """
    return ExecutorError(
        f"{where} {what}",
        hint="Another program may take part in this job, or a rank may run another version of cloudckpt; "
        "the next call tries again",
    )


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)
