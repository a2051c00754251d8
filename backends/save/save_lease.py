"""The marker of a save in progress: an object that says "don't collect this folder" until the save ends.

Garbage and a save in progress look alike: data objects that no ``.metadata`` names. The coordinator of a save
therefore puts a marker beside them before any rank sends a byte, renews it while the save lasts, and
deletes it at the end. The garbage collector deletes the marker of a save that it takes for dead before it
touches anything else; a save that finds its marker gone does not commit.
"""

from __future__ import annotations

import json
import re
import threading
import time
import weakref
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cloudckpt.backends.errors import (
    AccessDeniedError,
    CommitError,
    ExecutorError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    UnsupportedError,
)
from cloudckpt.backends.stores.base import ObjectInfo, ObjectStore, Overwrite, Update
from cloudckpt.backends.system import background_log, process_identity, system_limits
from cloudckpt.backends.system.printable import one_line

_log = background_log.logger(__name__)

MARKER: Final = re.compile(r"(?:.*/)?\.cloudckpt-save\.[0-9a-f]{32}")
"""Names of markers; each speaks for the folder that it is in."""
RENEWED_EVERY: Final = 60.0
"""Seconds between two renewals: a small part of the silence after which a save counts as dead."""
SILENT_FOR: Final = timedelta(minutes=10)
"""The default age after which a lease counts as expired."""


def marker_name(save_id: str) -> str:
    """Return the name of the marker of a save, in its checkpoint's folder."""
    return f".cloudckpt-save.{save_id}"


def silent_since() -> datetime:
    """Return the time from which on a marker must have been renewed, by this machine's clock."""
    return datetime.now(UTC) - SILENT_FOR


def is_silent(marker: ObjectInfo, since: datetime) -> bool:
    """Return True if a lease was not renewed after that time; False where the store has no times."""
    return marker.modified is not None and marker.modified <= since


class SaveLease:
    """The marker of one save. Its owner calls ``end`` or ``leave``; one that is dropped expires.

    Args:
        store: the checkpoint's.
        save_id: 32 hexadecimal digits, of this save alone.
        rank: of the coordinator, for people who read the marker.
        every: seconds between renewals.
        name: of the object, where it is not the marker of a save.
        notes: more that it says, as JSON has it.

    Raises:
        StorageError: the marker could not be put; nothing of a save may be sent then.
    """

    def __init__(
        self,
        store: ObjectStore,
        save_id: str,
        rank: int,
        every: float = RENEWED_EVERY,
        *,
        name: str | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self._kept = _Kept(store, name or marker_name(save_id), _content(save_id, rank, notes or {}))
        self._kept.put()
        self._stop = threading.Event()
        renewal = threading.Thread(
            target=_keep_renewed, args=(self._kept, self._stop, every), name="cloudckpt-marker", daemon=True
        )
        try:
            system_limits.start(renewal)
        except ExecutorError:
            self._kept.remove()
            raise
        weakref.finalize(self, self._stop.set)

    def check(self) -> None:
        """Check that no other process took this save for dead.

        Raises:
            CommitError: the marker is gone, and parts of the save may be.
            StorageError: the store did not say.
        """
        if not self.is_there():
            raise CommitError(
                "this save was taken for dead and cleaned up: its marker is gone",
                uri=self._kept.store.uri,
                object_name=self._kept.name,
                hint="Nothing was committed; give gc a longer silent_for, and save again",
            )

    def is_there(self) -> bool:
        """Return True if the lease of this save still exists.

        Raises:
            StorageError: the store did not say.
        """
        return self._kept.is_there()

    def is_gone(self) -> bool:
        """Return True if another process deleted the lease; False where the store can't tell."""
        try:
            return not self.is_there()
        except StorageError as error:
            _log.warning("the marker of a save could not be looked at: %s", error)
            return False

    def leave(self) -> None:
        """Renew no more, and let the marker expire."""
        self._stop.set()

    def end(self) -> None:
        """Take the marker away: nothing of the save is left that it would have to guard."""
        self._stop.set()
        self._kept.remove()


class _Kept:
    """The marker object, as this process last saw it."""

    def __init__(self, store: ObjectStore, name: str, content: bytes) -> None:
        self.store = store
        self.name = name
        self._content = content
        self._lock = threading.Lock()
        self._ended = False
        self._version = ""
        self._renewed_at = time.monotonic()

    def put(self) -> None:
        try:
            self._version = self.store.put(self.name, self._content, Overwrite()).version or ""
            self._renewed_at = time.monotonic()
        except (AccessDeniedError, UnsupportedError):
            raise  # nothing was put
        except BaseException:
            self.remove()  # it may be there all the same
            raise

    def renew(self) -> bool:
        """Put the marker again; False once it is deleted, for it must not come back."""
        with self._lock:
            if self._ended:
                return False
            try:
                renewed = self._renewed_on_condition() or self._renewed_where_it_is()
            except ObjectNotFoundError:
                return False
            except StorageError as error:
                self._report(error)
                return True
            self._version = renewed.version or ""
            self._renewed_at = time.monotonic()
            return True

    def is_there(self) -> bool:
        return self.store.holds(self.name)

    def remove(self) -> None:
        with self._lock:
            self._ended = True
            try:
                self.store.delete([self.name])
            except StorageError as error:
                _log.warning("a lease could not be deleted and stays until it expires: %s", error)

    def _renewed_on_condition(self) -> ObjectInfo | None:
        """Put the marker over the version last seen; None where the store refuses or lacks the condition."""
        if not self.store.capabilities.conditional_update:
            return None
        try:
            return self.store.put(self.name, self._content, Update(self._version))
        except PreconditionFailedError:
            return None

    def _renewed_where_it_is(self) -> ObjectInfo:
        """Put the marker if it is there, at any version: only this save puts it.

        Raises:
            ObjectNotFoundError: it was deleted.
        """
        self.store.stat(self.name)
        return self.store.put(self.name, self._content, Overwrite())

    def _report(self, error: StorageError) -> None:
        """Log that a renewal failed, and what follows if none succeeds."""
        _log.warning(
            "the lease %s at %s was last renewed %.0f s ago and could not be renewed now: %s. "
            "Without a renewal for %.0f s, other processes take this one for dead",
            self.name,
            one_line(self.store.uri),
            time.monotonic() - self._renewed_at,
            error,
            SILENT_FOR.total_seconds(),
        )


def _keep_renewed(kept: _Kept, stop: threading.Event, every: float) -> None:
    while not stop.wait(every) and kept.renew():
        pass


def _content(save_id: str, rank: int, notes: Mapping[str, Any]) -> bytes:
    """Return the text for a person who finds the lease."""
    return json.dumps(
        {
            "save_id": save_id,
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "rank": rank,
            **process_identity.own(),
            **notes,
        }
    ).encode()
