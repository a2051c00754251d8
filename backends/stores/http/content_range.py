"""Check that the answer to a request for a range has that range."""

from __future__ import annotations

import re
from typing import Final

from cloudckpt.backends.errors import IntegrityError, StorageError

_FORM: Final = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")
_PARTIAL: Final = 206


def whole_size(
    *, status: int, given: str | None, length: int | None, offset: int, size: int, server: str
) -> int | None:
    """Return the size of the whole object, None where the answer does not have it.

    Args:
        status: that of the answer.
        given: its ``Content-Range``.
        length: its ``Content-Length``.
        offset: the first byte that was asked for.
        size: the bytes that were asked for.
        server: the name of the server, for errors.

    Raises:
        IntegrityError: the object ends before the range does.
        StorageError: the answer has another range, or contradicts itself.
    """
    if length is None or length < 0:
        raise _wrong(server, "without the length of the object's bytes")
    if given is None:
        if status == _PARTIAL:
            raise _wrong(server, "a part of the object and does not say which")
        if offset:
            raise StorageError(f"the endpoint {server} ignores ranges", hint=_CURE)
        first, last, whole = 0, length - 1, str(length)
    else:
        found = _FORM.fullmatch(given.strip())
        if found is None:
            raise _wrong(server, f"with the range {given[:100]!r}, which can't be read")
        first, last, whole = int(found[1]), int(found[2]), found[3]
        if first != offset or last >= offset + size or (whole != "*" and last >= int(whole)):
            raise _wrong(server, "with another range than was asked for")
        if last - first + 1 != length:
            raise _wrong(server, f"with {length:,} bytes for the range {given[:100]!r}")
    if last + 1 < offset + size:
        raise IntegrityError(f"the object ends at byte {last + 1}, before byte {offset + size}")
    return None if whole == "*" else int(whole)


_CURE: Final = "Check the option endpoint_url, and proxies, gateways and caches before the server"


def _wrong(server: str, what: str) -> StorageError:
    return StorageError(f"the endpoint {server} answered {what}", hint=_CURE)
