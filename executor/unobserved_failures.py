"""Unobserved failures: logged once, when the handle is collected or the interpreter ends.

A finalizer may run on any thread and within any lock, that of a log's queue included. So it only leaves a
message, which is logged by the next save, by `close`, or at the end of the interpreter.
"""

from __future__ import annotations

import atexit
import collections
import os
import weakref
from typing import Any, Final

from cloudckpt.backends.system import background_log

_log = background_log.logger(__name__)

_pending: Final[collections.deque[str]] = collections.deque()
_watched: Final[set[weakref.finalize[Any, Any]]] = set()
_owner: Final = os.getpid()


class Unobserved:
    """The failure of a save whose handle has not been asked.

    Args:
        handle: the handle, whose collection logs the message.
        message: what to log.
    """

    def __init__(self, handle: object, message: str) -> None:
        self._finalizer = weakref.finalize(handle, _pending.append, message)
        self._finalizer.atexit = False  # `_log_all` runs after every executor has closed
        _watched.add(self._finalizer)

    def observed(self) -> None:
        """Log nothing."""
        self._finalizer.detach()
        _watched.discard(self._finalizer)


def log_pending() -> None:
    """Log the failures of handles that have been collected."""
    for finalizer in list(_watched):
        if not finalizer.alive:
            _watched.discard(finalizer)
    while _pending:
        try:
            message = _pending.popleft()
        except IndexError:  # another thread was first
            return
        _log.error("%s", message)


@atexit.register  # at the import, before any executor registers its own: it runs after theirs
def _log_all() -> None:
    if os.getpid() != _owner:  # a forked process has the handles of the other, which logs them
        return
    for finalizer in list(_watched):
        finalizer()
    log_pending()
    background_log.flush()
