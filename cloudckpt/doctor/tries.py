"""The operations of a save, a load and a clean-up, each tried once on a store."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from cloudckpt.backends.checksums import algorithm_for
from cloudckpt.backends.errors import (
    AccessDeniedError,
    CheckpointError,
    IntegrityError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    UnsupportedError,
)
from cloudckpt.backends.finding import Finding
from cloudckpt.backends.manage.probe_objects import ProbeObjects
from cloudckpt.backends.stores.base import Create, ObjectStore, Overwrite, Update, Upload
from cloudckpt.backends.stores.exam import Exam

_DATA: Final = b"can this job checkpoint here?"
_EXPIRE: Final = "Have the server remove incomplete uploads by itself, as by a lifecycle rule"


@dataclass(slots=True)
class Tries:
    """The operations of one store, tried one after another; what needs one that failed is skipped."""

    store: ObjectStore
    exam: Exam
    probe_objects: ProbeObjects
    example: str | None = None
    """The name of an object that is there."""
    gc_aborts: bool = True
    """False once the store has turned out not to list or not to abort uploads."""
    _failed: set[str] = field(default_factory=set)

    def small(self) -> Iterator[Finding]:
        """Put, read and list a small object, and try conditions and checksums."""
        yield self._tried("put", self._put)
        yield self._tried("get", self._get, needs="put")
        yield self._tried("list", self._list)
        # S3 wants the permission to read for the condition that a certain version is there.
        yield self._tried("conditions", self._conditions, operation="replace", needs="get")

    def large(self) -> Iterator[Finding]:
        """Upload an object in parts: complete, check, list while it is pending, and abort."""
        yield self._tried("multipart", self._multipart, operation="upload")
        yield self._tried("checksum", self._checksum, operation="upload", needs="multipart")
        yield self._tried("pending", self._pending, needs="multipart")
        yield self._tried("abort", self._abort, needs="multipart")
        if "abort" not in self._failed:
            yield from self._features()

    def deletion(self) -> Iterator[Finding]:
        """Delete an object."""
        yield self._tried("delete", self._delete, needs="put")

    def _tried(
        self, check: str, act: Callable[[], Finding], *, operation: str = "", needs: str = ""
    ) -> Finding:
        if needs in self._failed:
            self._failed.add(check)
            return Finding(check, "skipped", f"it can't be tried where {needs} failed")
        try:
            finding = act()
        except AccessDeniedError as error:
            finding = self._denied(check, operation or check, error)
        except CheckpointError as error:
            finding = Finding(check, "failed", error.message, error.hint or "")
        if finding.state == "failed":
            self._failed.add(check)
        return finding

    def _denied(self, check: str, operation: str, error: AccessDeniedError) -> Finding:
        action = self.exam.action(operation, error)
        advice = f"Grant {action}" if action else error.hint or ""
        return Finding(check, "failed", error.message, advice, action)

    def _put(self) -> Finding:
        name = self.probe_objects.name()
        self.store.put(name, _DATA, Overwrite())
        self.example = name
        return Finding("put", "ok", "a small object can be put")

    def _get(self) -> Finding:
        name = self._there
        data, _ = self.store.get(name)
        part = bytearray(_DATA[4:])
        self.store.read_into(name, 4, [memoryview(part)])
        if data != _DATA or bytes(part) != _DATA[4:] or self.store.stat(name).size != len(_DATA):
            return Finding(
                "get", "failed", "what is read is not what was put", "Use another store: this one loses bytes"
            )
        return Finding("get", "ok", "it reads back the same, whole and in part")

    def _list(self) -> Finding:
        name = self.example
        listed = [info.name for info in self.store.list(name or self.probe_objects.name()).objects]
        if name is not None and listed != [name]:
            what = "a listing does not show an object that was just put"
            return Finding("list", "failed", what, "Use a store whose listings are up to date")
        return Finding("list", "ok", "names below the URI can be listed")

    def _conditions(self) -> Finding:
        able = self.store.capabilities
        if not (able.conditional_create and able.conditional_update):
            lacking = [
                one
                for one, supported in (
                    ("that nothing exists", able.conditional_create),
                    ("that a version exists", able.conditional_update),
                )
                if not supported
            ]
            what = (
                f"the server does not support the condition {' or '.join(lacking)} on a put: "
                "of two jobs that save to one place, both may win"
            )
            advice = "Let one job alone save here, or use a server that supports both conditions"
            return Finding("conditions", "warning", what, advice)
        name = self._there
        replaced = self.store.put(name, _DATA, Overwrite())
        if not self._is_refused(name, Create()):
            return Finding("conditions", "failed", "a put that must find nothing replaces what is there")
        self.store.put(name, _DATA, Update(replaced.version or ""))
        fresh = self.probe_objects.name()
        self.store.put(fresh, _DATA, Create())
        return Finding("conditions", "ok", "a put is refused where its condition does not hold")

    def _is_refused(self, name: str, condition: Create) -> bool:
        try:
            self.store.put(name, _DATA, condition)
        except PreconditionFailedError:
            return True
        return False

    def _multipart(self) -> Finding:
        name = self.probe_objects.name()
        upload = self.probe_objects.begin_upload(name)
        part = self.probe_objects.upload_part(upload, 1, 0, _DATA)
        self.store.complete_upload(upload, [part], confirm=False)
        self.probe_objects.ended(upload)
        with contextlib.suppress(AccessDeniedError):  # that is for another try to say
            if self.store.stat(name).size != len(_DATA):
                return Finding("multipart", "failed", "the completed object is not what was sent")
        return Finding("multipart", "ok", "an object sent in parts is there once it is completed")

    def _checksum(self) -> Finding:
        algorithm = self.store.part_checksum
        if algorithm is None:
            what = "the store checks none of parts: damage on the way shows in loading and in verify"
            return Finding("checksum", "ok", what)
        wrong = base64.b64encode(bytes(algorithm_for(algorithm).width - 1) + b"\1").decode()
        upload, data = self._sent(), [memoryview(_DATA)]
        try:
            self.store.upload_part(upload, 2, len(_DATA), data, checksum=f"{algorithm}:{wrong}")
        except IntegrityError:
            return Finding("checksum", "ok", f"a part with a wrong {algorithm} is refused")
        return Finding(
            "checksum",
            "warning",
            f"the server takes a part with a wrong {algorithm}",
            "Leave the option checksum at auto; loads compare checksums of their own",
        )

    def _pending(self) -> Finding:
        upload = self._sent()
        try:
            listed = [pending.upload for pending in self.store.pending_uploads(upload.name)]
        except UnsupportedError as error:
            self.gc_aborts = False
            what = f"uploads that are not ended can't be listed, so gc finds none: {error.message}"
            return Finding("pending", "warning", what, _EXPIRE)
        if upload in listed:
            return Finding("pending", "ok", "uploads that are not ended are listed, for gc")
        return Finding("pending", "ok", "uploads that are not ended are not listed: the store forgets them")

    def _abort(self) -> Finding:
        upload = self._sent()
        try:
            self.store.abort_upload(upload)
        except UnsupportedError as error:
            self.gc_aborts = False
            return Finding("abort", "warning", f"uploads can't be aborted: {error.message}", _EXPIRE)
        self.probe_objects.ended(upload)
        with contextlib.suppress(ObjectNotFoundError, AccessDeniedError):
            self.store.stat(upload.name)
            return Finding("abort", "failed", "an upload that was given up is visible")
        return Finding("abort", "ok", "an upload can be given up, and leaves nothing")

    def _features(self) -> Iterator[Finding]:
        """Name the features of a server that had to be probed."""
        try:
            if features := self.store.features():
                yield Finding("features", "ok", features)
        except CheckpointError as error:
            yield Finding(
                "features", "unknown", f"they could not be probed: {error.message}", error.hint or ""
            )

    def _sent(self) -> Upload:
        """Return an upload with a part: who may not abort it can complete it, to be rid of it."""
        upload = self.probe_objects.begin_upload(self.probe_objects.name())
        self.probe_objects.upload_part(upload, 1, 0, _DATA)
        return upload

    def _delete(self) -> Finding:
        name = self._there
        self.store.delete([name])
        self.example = None
        # S3 denies a look at what is not there to who may not list.
        with contextlib.suppress(ObjectNotFoundError, AccessDeniedError):
            self.store.stat(name)
            return Finding("delete", "failed", "an object that was deleted is there still")
        return Finding("delete", "ok", "an object can be deleted")

    @property
    def _there(self) -> str:
        if self.example is None:  # guarded by `needs`
            raise StorageError("nothing was put")
        return self.example
