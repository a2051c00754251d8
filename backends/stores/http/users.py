"""Count the users of a set of connections, which is closed when the last of them releases it."""

from __future__ import annotations

import threading
import weakref
from typing import Any

_lock = threading.Lock()
_users: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()


def use(connections: object, user: object) -> None:
    """Note that an object uses connections, until `release` or the end of its life."""
    with _lock:
        _users.setdefault(connections, weakref.WeakSet()).add(user)


def release(connections: object, user: object) -> bool:
    """Note that an object uses connections no more; returns True if no other one does."""
    with _lock:
        users = _users.get(connections)
        if users is None:
            return True
        users.discard(user)
        return not users
