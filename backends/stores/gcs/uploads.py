"""Uploads to GCS by the multipart uploads of its XML API, with retries and lost answers settled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Final

from cloudckpt.backends.checksums import CRC32C
from cloudckpt.backends.errors import (
    CheckpointError,
    IntegrityError,
    StorageError,
    UnansweredError,
    UnsupportedError,
)
from cloudckpt.backends.stores.base import Departed, ObjectInfo, Part, PartLimits, PendingUpload, Upload
from cloudckpt.backends.stores.gcs import multipart as gcs_multipart
from cloudckpt.backends.stores.gcs import read as gcs_read
from cloudckpt.backends.stores.gcs import write as gcs_write
from cloudckpt.backends.stores.gcs.client import Client
from cloudckpt.backends.stores.gcs.errors import GoneError, explained, status_of
from cloudckpt.backends.stores.gcs.multipart import Completed, Page
from cloudckpt.backends.stores.gcs.requests import Requests
from cloudckpt.backends.stores.lost_begins import abort_others
from cloudckpt.backends.stores.retry import Outcome
from cloudckpt.backends.stores.s3.checksums import combined, given_or_of

LIMITS: Final = PartLimits(5 << 20, 5 << 30, 10_000, in_place=True)
"""Limits of parts, as in Google's "Quotas & limits"."""


class MultipartUploads:
    """Uploads of one store. Safe to use from several threads."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    @property
    def checksum(self) -> str | None:
        """The algorithm of the checksum that is sent with a part, None where the options want none."""
        return None if self._requests.target.options.checksum == "none" else CRC32C.name

    def begin(self, name: str) -> Upload:
        """Begin an upload.

        An attempt whose answer was lost may have started another upload, which is aborted.
        """
        requests = self._requests
        outcome = requests.outcome(lambda client: gcs_multipart.begin(requests, client, name))
        with explained(requests.target, requests.client.route, name):
            upload = Upload(name, outcome.result())
        if outcome.lost:
            abort_others(
                upload,
                self.pending,
                self.abort,
                uri=requests.target.uri,
                request="the begin of an upload",
                cure="gc aborts it, and so does a lifecycle rule",
            )
        return upload

    def part(
        self,
        upload: Upload,
        number: int,
        buffers: Sequence[memoryview],
        checksum: str | None,
        departed: Departed | None,
    ) -> Part:
        """Send a part. One without bytes is not sent: GCS makes no object of it."""
        requests = self._requests
        if not sum(buffer.nbytes for buffer in buffers):
            return Part(number, 0)
        wanted = given_or_of(self.checksum, checksum, buffers) if self.checksum else None

        def send(client: Client) -> Part:
            part = gcs_multipart.put_part(
                requests, client, upload, number, buffers, checksum=wanted, departed=departed
            )
            if departed is not None:
                departed(part.size)
            return part

        return requests.ask(send, upload.name)

    def complete(self, upload: Upload, parts: Sequence[Part], *, confirm: bool) -> ObjectInfo:
        """Complete an upload, and compare the object with its parts.

        Where the answer was lost, the object decides: by its size, and by its checksum where both are known.

        Raises:
            IntegrityError: the parts are not those of one upload, or the object is not what they add up to.
                Such an object is deleted.
            UnansweredError: the upload may have been completed, or still be.
        """
        ordered = sorted(parts, key=lambda part: part.number)
        if [part.number for part in ordered] != list(range(1, len(ordered) + 1)):
            raise IntegrityError(
                "the parts are not those of one upload",
                uri=self._requests.target.uri,
                object_name=upload.name,
            )
        ordered = [part for part in ordered if part.size]
        if not ordered:
            return self._complete_empty(upload)
        requests, size, expected = self._requests, sum(part.size for part in ordered), combined(ordered)
        outcome = requests.outcome(
            lambda client: gcs_multipart.complete(requests, client, upload, ordered), on_behalf=True
        )
        if outcome.error is not None:
            return self._settled(upload, outcome, size, expected)
        done = outcome.result()
        is_proven = expected is not None and done.checksum == expected
        if done.checksum is not None and expected is not None and not is_proven:
            other = f"the completed object has {done.checksum}, and its parts make {expected}"
            self._discard(upload.name, done.generation, other)
        # A checksum of all bytes says more than a size.
        if done.generation is not None and (is_proven or not confirm):
            return ObjectInfo(upload.name, size, done.generation, None, done.checksum)
        info = gcs_read.stat(requests, upload.name)
        if wrong := _difference(info, size, expected):
            self._discard(upload.name, info.version, wrong)
        return info

    def abort(self, upload: Upload) -> None:
        """Abort an upload. One that is gone is no error."""
        requests = self._requests
        requests.ask(lambda client: gcs_multipart.abort(requests, client, upload), upload.name)

    def pending(self, prefix: str, *, is_known: bool = True) -> Iterator[PendingUpload]:
        """Yield the uploads below a prefix of names that were neither completed nor aborted.

        Unless the server ``is_known`` to have multipart uploads, one that refuses the listing has none.

        Raises:
            UnsupportedError: the account lacks the permission, which a save does without.
        """
        requests, following = self._requests, dict[str, str]()
        while True:
            before = following

            def page_of(client: Client, following: dict[str, str] = before) -> Page:
                return gcs_multipart.listed(requests, client, prefix, following)

            outcome = requests.outcome(page_of)
            if status_of(outcome.error) == HTTPStatus.FORBIDDEN:
                raise UnsupportedError(
                    "the account may not list multipart uploads",
                    uri=requests.target.uri,
                    hint=f"It needs storage.multipartUploads.list on the bucket {requests.bucket!r}, so that "
                    "gc finds the uploads of killed jobs; a lifecycle rule aborts them, too",
                ) from outcome.error
            with explained(requests.target, requests.client.route):
                if outcome.error is not None and not is_known and gcs_multipart.is_unsupported(outcome.error):
                    return
                page = outcome.result()
            yield from page.uploads
            if not page.truncated:
                return
            following = dict(page.following)
            if following in ({}, before):
                raise StorageError(
                    "the next page of the multipart uploads begins where this one did, or nowhere",
                    uri=requests.target.uri,
                )

    def _complete_empty(self, upload: Upload) -> ObjectInfo:
        """Put an empty object in the place of an upload without bytes, which GCS does not complete."""
        requests, name = self._requests, upload.name
        outcome = requests.outcome(lambda client: gcs_multipart.abort(requests, client, upload))
        with explained(requests.target, requests.client.route, name):
            if not outcome.result() and outcome.attempts == 1:
                raise GoneError("the upload does not exist: it was completed or aborted")
        return requests.ask(lambda client: gcs_write.insert(requests, client, name, b"", {}), name)

    def _settled(
        self, upload: Upload, outcome: Outcome[Completed], size: int, expected: str | None
    ) -> ObjectInfo:
        """Return the object of an upload whose completion failed, where an attempt did complete it."""
        requests, error = self._requests, outcome.error
        is_gone = gcs_multipart.is_gone(error)
        if outcome.lost or (is_gone and outcome.attempts > 1):
            try:
                info = gcs_read.stat(requests, upload.name)
            except StorageError:
                info = None
            if info is not None and not _difference(info, size, expected):
                return info
        with explained(requests.target, requests.client.route, upload.name):
            if outcome.lost and not is_gone:
                raise self._unanswered(outcome)
            outcome.result()
        raise AssertionError("a failed outcome has an error")

    def _unanswered(self, outcome: Outcome[Completed]) -> UnansweredError:
        """Return the error for a completion that may have been carried out."""
        tries = "its one attempt" if outcome.attempts == 1 else f"one of {outcome.attempts} attempts"
        try:
            with explained(self._requests.target, self._requests.client.route):
                outcome.result()
        except CheckpointError as last:
            message = f"the completion was sent, and the answer to {tries} was lost: {last.message}"
            return UnansweredError(message, hint=last.hint)
        raise AssertionError("a failed outcome has an error")

    def _discard(self, name: str, generation: str | None, wrong: str) -> None:
        """Delete a completed object that is not what its parts add up to.

        Raises:
            IntegrityError: always, with what is wrong.
        """
        requests = self._requests
        requests.ask(lambda client: gcs_write.delete(requests, client, name, generation), name)
        raise IntegrityError(wrong, uri=requests.target.uri, object_name=name)


def _difference(info: ObjectInfo, size: int, expected: str | None) -> str | None:
    """Return how an object differs from its parts, None where it does not."""
    if info.size != size:
        return f"the completed object has {info.size:,} bytes, and its parts {size:,}"
    if expected is not None and info.checksum is not None and info.checksum != expected:
        return f"the completed object has {info.checksum}, and its parts make {expected}"
    return None
