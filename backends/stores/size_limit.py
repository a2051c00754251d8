"""The size up to which objects are read whole: a writer to the bucket must not fill a reader's memory."""

from __future__ import annotations

from typing import Final

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import ConfigurationError, IntegrityError

_METADATA: Final = ".metadata"
_OTHERS: Final = 64 << 20
"""Bytes of a marker, a lease or a journal. Theirs are far below."""


def check_whole(target: Target, name: str, size: int) -> None:
    """Compare the size of an object that is to be read whole with the limit for it.

    Args:
        target: of the store.
        name: of the object.
        size: of the object in bytes, before any of them is read.

    Raises:
        IntegrityError: the object is larger than ``metadata_limit``, or than 64 MiB if it is no metadata.
    """
    limit = limit_of(target, name)
    if size > limit:
        raise IntegrityError(
            f"the object has {size} bytes, and at most {limit} are read whole",
            uri=target.uri,
            object_name=name,
            hint="Raise metadata_limit if an honest save wrote it; else load another step",
        )


def limit_of(target: Target, name: str) -> int:
    """Return how many bytes an object that is read whole may have."""
    limit = target.options.metadata_limit
    return int(limit if name.endswith(_METADATA) else min(limit, _OTHERS))


def loadable(target: Target, name: str, data: bytes) -> bytes:
    """Return the bytes of a ``.metadata`` that is about to be put.

    Raises:
        ConfigurationError: readers with the same options would refuse it.
    """
    limit = limit_of(target, name)
    if len(data) > limit:
        raise ConfigurationError(
            f"the checkpoint's metadata would have {len(data)} bytes, and metadata_limit is {limit}",
            uri=target.uri,
            object_name=name,
            hint="Raise metadata_limit, for saves and for loads",
        )
    return data
