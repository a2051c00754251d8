"""The journal of a copy: the objects that are at the destination already, for a later copy to go on.

One hidden object, in the folder of the checkpoint that is being copied to. It names the copy that it belongs
to, and is put on the condition of the version before: a copy that another one took over can't put it any
more, and learns so. Anyone who can write there may have written it, so that nothing is taken on
its word that could do harm: an upload is asked for at the store, and parts have to be those of this copy.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Final, Literal

import pydantic
from pydantic import Field

from cloudckpt.backends.copy.copy_checksums import Edge
from cloudckpt.backends.errors import (
    CommitError,
    ConfigurationError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    UnsupportedError,
)
from cloudckpt.backends.save.save_lease import marker_name
from cloudckpt.backends.stores.base import Condition, Create, ObjectStore, Overwrite, Part, Update, Upload
from cloudckpt.backends.system import background_log, system_limits
from cloudckpt.backends.system.printable import one_line

_log = background_log.logger(__name__)

JOURNAL_NAME: Final = ".cloudckpt-copy"
JOURNAL: Final = re.compile(rf"(?:.*/)?{re.escape(JOURNAL_NAME)}")
"""Names of journals; each speaks of the folder that it is in."""
_DATA = re.compile(r"[\w.-]+\.distcp")
_EVERY: Final = 1.0
"""Seconds between two puts."""
_SHARE: Final = 5
"""Times as long as a put took that nothing is put after it."""
_TRIES: Final = 5
"""Times that a journal is taken from copies that begin at the same moment."""
_LONGEST_TAIL: Final = 1024
"""Characters of a part's tag. What a session of GCS leaves with its caller is bytes: none for a journal."""

_Id = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class SentPart:
    """A part that the destination holds."""

    part: Part
    checksum: str
    """``<algorithm>:<base64>`` of its bytes."""
    edges: tuple[Edge, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """The progress of one object."""

    size: _Count
    version: str | None
    """Of the object that is copied."""
    part_size: _Count = 0
    upload_id: str | None = None
    parts: tuple[SentPart, ...] = ()
    done: str | None = None
    """The version of the whole object at the destination."""


@dataclass(frozen=True, slots=True)
class Document:
    """The content of a journal."""

    copy: _Id
    digest: str
    """Of the source's metadata."""
    format: Literal[1] = 1
    objects: dict[str, Entry] = field(default_factory=dict)

    @property
    def uploads(self) -> list[Upload]:
        """Return the open uploads of the journal."""
        found = ((name, entry.upload_id) for name, entry in self.objects.items())
        return [Upload(name, upload_id) for name, upload_id in found if upload_id is not None]


_FORM: Final = pydantic.TypeAdapter(Document)


def read_journal(store: ObjectStore, name: str = JOURNAL_NAME) -> tuple[Document | None, str | None]:
    """Return the journal in a folder and its version; None where there is none, or for what can't be read."""
    try:
        data, info = store.get(name)
    except ObjectNotFoundError:
        return None, None
    try:
        return _FORM.validate_json(data, strict=True), info.version or ""
    except pydantic.ValidationError:
        _log.warning("%s: a journal of another form is replaced", one_line(store.uri))
        return None, info.version or ""


class CopyJournal:
    """The journal of one copy, which takes over what another one left. Safe to use from several threads.

    Args:
        store: the destination.
        copy_id: 32 hexadecimal digits, those of this copy's marker.
        digest: of the source's metadata.

    Raises:
        CommitError: others take it over all the time.
        StorageError: it could not be read or put.
    """

    def __init__(self, store: ObjectStore, copy_id: str, digest: str) -> None:
        self._store = store
        self._own = Document(copy_id, digest)
        self._lock = threading.Lock()
        self._put_lock = threading.Lock()
        self._objects: dict[str, Entry] = {}
        self._parts: dict[str, list[SentPart]] = {}
        self._changed = False
        self._lost: CommitError | None = None
        self._shared: list[Upload] = []
        self._wake, self._ended = threading.Event(), threading.Event()
        self._version = self._taken_over()
        self._thread = threading.Thread(target=self._keep, name="cloudckpt-journal", daemon=True)
        system_limits.start(self._thread)

    @property
    def found(self) -> Mapping[str, Entry]:
        """Return the progress of the previous copy."""
        return self._found

    def begin(self, name: str, entry: Entry) -> None:
        """Note an object whose upload is open, with the parts that it has."""
        with self._lock:
            self._objects[name] = replace(entry, parts=())
            self._parts[name] = list(entry.parts)
            self._changed = True

    def add(self, name: str, part: SentPart) -> None:
        """Note a part."""
        if len(part.part.etag) <= _LONGEST_TAIL:
            with self._lock:
                self._parts[name].append(part)
                self._changed = True

    def finish(self, name: str, entry: Entry) -> None:
        """Note an object that is whole, soon."""
        with self._lock:
            self._objects[name] = entry
            self._parts.pop(name, None)
            self._changed = True
        self._wake.set()

    def forget(self, name: str) -> None:
        """Note that an object has to be started anew."""
        with self._lock:
            self._objects.pop(name, None)
            self._parts.pop(name, None)
            self._changed = True

    def check(self) -> None:
        """Make sure that no other copy took this one's place.

        Raises:
            CommitError: one did.
        """
        if self._lost is not None:
            raise self._lost

    def leave(self) -> bool:
        """Put what is known now, for the next copy to go on with; False where that has started already."""
        self._stop()
        self._changed = True  # or what is there would not be looked at
        try:
            self._put()
        except StorageError as error:
            if self._lost is None:
                _log.warning("what was copied last will be copied again: %s", error)
        return self._lost is None

    @property
    def unshared(self) -> list[Upload]:
        """Uploads of this copy that no other can know of, for they are in no journal yet."""
        with self._lock:
            started = replace(self._own, objects=dict(self._objects)).uploads
        return [upload for upload in started if upload not in self._shared]

    def end(self) -> None:
        """Take the journal away, unless it is another copy's by now."""
        self._stop()
        try:
            found, _ = read_journal(self._store)
            if self._lost is None and (found is None or found.copy == self._own.copy):
                self._store.delete([JOURNAL_NAME])
        except StorageError as error:
            _log.warning("the journal of a copy could not be deleted, and stays: %s", error)

    def _stop(self) -> None:
        self._ended.set()
        self._wake.set()
        self._thread.join()

    def _taken_over(self) -> str:
        """Put this copy's name on the journal, and keep what it says if it is of the same source."""
        for _ in range(_TRIES):
            found, version = read_journal(self._store)
            if found is not None and found.copy != self._own.copy:
                self._store.delete([marker_name(found.copy)])  # if it still lives, it gives up
            same = found is not None and found.digest == self._own.digest
            self._found: dict[str, Entry] = dict(found.objects) if found is not None and same else {}
            if found is not None and not same:
                for upload in found.uploads:
                    give_up(self._store, upload)
            self._objects = dict(self._found)
            self._parts = {name: [*entry.parts] for name, entry in self._found.items() if entry.upload_id}
            try:
                # As it was, for this copy may die before it has looked at everything.
                document = replace(self._own, objects=self._found)
                self._shared = document.uploads
                return self._send(document, version)
            except PreconditionFailedError:
                again, version = read_journal(self._store)
                if again is not None and again.copy == self._own.copy:
                    return version or ""
        raise self._gave_way()

    def _send(self, document: Document, version: str | None) -> str:
        can = self._store.capabilities
        condition: Condition = Create() if version is None else Update(version)
        if not (can.conditional_create if version is None else can.conditional_update):
            condition = Overwrite()
        return self._store.put(JOURNAL_NAME, _FORM.dump_json(document), condition).version or ""

    def _keep(self) -> None:
        while not self._ended.is_set():
            self._wake.wait(_EVERY)
            self._wake.clear()
            began = time.monotonic()
            try:
                self._put()
            except CommitError:
                return
            except StorageError as error:
                _log.warning("the journal of a copy could not be put, the next time may do: %s", error)
            self._ended.wait(_SHARE * (time.monotonic() - began))

    def _put(self) -> None:
        with self._put_lock:
            with self._lock:
                if not self._changed or self._lost is not None:
                    return
                self._changed = False
                parts = {name: tuple(parts) for name, parts in self._parts.items()}
                objects = {
                    name: replace(entry, parts=parts.get(name, ())) for name, entry in self._objects.items()
                }
            document = replace(self._own, objects=objects)
            try:
                self._version = self._put_over(document)
            except BaseException:
                self._changed = True
                raise
            self._shared = document.uploads

    def _put_over(self, document: Document) -> str:
        if not self._store.capabilities.conditional_update:
            found, _ = read_journal(self._store)
            if found is None or found.copy != self._own.copy:
                self._lost = self._gave_way()
                raise self._lost
        try:
            return self._send(document, self._version)
        except (ObjectNotFoundError, PreconditionFailedError):
            found, version = read_journal(self._store)
            if found is None or found.copy != self._own.copy:
                self._lost = self._gave_way()
                raise self._lost from None
            self._changed = True  # the first try of this very put, or of one before
            return version or ""

    def _gave_way(self) -> CommitError:
        return gave_way(self._store.uri)


def gave_way(uri: str) -> CommitError:
    """Return the error of a copy that must not commit any more."""
    return CommitError(
        "another copy to the same place took over, or gc took this one for dead",
        uri=uri,
        hint="This one committed nothing: look what is there, and copy again if need be",
    )


def left_by(store: ObjectStore, name: str) -> tuple[list[Upload], list[str]]:
    """Return the open uploads of a journal's copy, and its objects whose names are not unique.

    Names are relative to the store, which may be a whole run's.
    """
    document, _ = read_journal(store, name)
    folder = name.removesuffix(JOURNAL_NAME)
    if document is None:
        return [], []
    entries = {name: entry for name, entry in document.objects.items() if _DATA.fullmatch(name)}
    uploads = [Upload(folder + name, one.upload_id) for name, one in entries.items() if one.upload_id]
    return [upload for upload in uploads if may_be_pending(store, upload)], [
        folder + name for name in entries
    ]


def may_be_pending(store: ObjectStore, upload: Upload) -> bool:
    """Return False if the store says that an upload has ended, or was never its own.

    A store that lists no uploads does not say. To abort an upload that has ended is no error.
    """
    try:
        return store.is_pending(upload)
    except UnsupportedError:
        return True


def give_up(store: ObjectStore, upload: Upload) -> None:
    """Abort an upload that a journal names, if it is one."""
    try:
        if may_be_pending(store, upload):
            store.abort_upload(upload)
    except (StorageError, ConfigurationError) as error:
        _log.warning("an upload of an earlier copy could not be aborted, and stays pending: %s", error)
