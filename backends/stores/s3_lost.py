"""Which requests of a thread went out and got no answer, although a later try may have got one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from botocore.exceptions import ConnectTimeoutError, EndpointConnectionError

_tries = threading.local()


def note_lost_answer(caught_exception: Exception | None, **_: object) -> None:
    """Remember a try that ended without an answer; botocore calls this after each one, on its thread."""
    never_sent = isinstance(caught_exception, EndpointConnectionError | ConnectTimeoutError)
    if caught_exception is not None and not never_sent:
        _tries.lost = True


@contextlib.contextmanager
def lost_answers() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether an answer was lost to this thread since the block began."""
    _tries.lost = False
    yield lambda: bool(_tries.lost)
