"""Objects in a bucket of Google Cloud Storage, by its JSON API; uploads by its XML API where there is one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.stores.base import (
    Arrived,
    Capabilities,
    Condition,
    Create,
    Departed,
    Listing,
    ObjectInfo,
    ObjectStore,
    Overwrite,
    Part,
    PartLimits,
    PendingUpload,
    Update,
    Upload,
)
from cloudckpt.backends.stores.gcs import read as gcs_read
from cloudckpt.backends.stores.gcs import resumable_upload as gcs_session
from cloudckpt.backends.stores.gcs import write as gcs_write
from cloudckpt.backends.stores.gcs.answers import written_info
from cloudckpt.backends.stores.gcs.capabilities import GCSCapabilities, PutSupport, server_of
from cloudckpt.backends.stores.gcs.copy import copied
from cloudckpt.backends.stores.gcs.delete import delete_objects
from cloudckpt.backends.stores.gcs.errors import GoneError, explained
from cloudckpt.backends.stores.gcs.requests import Requests
from cloudckpt.backends.stores.gcs.resumable_upload import Session, StatusUnknownError, WrongSizeError
from cloudckpt.backends.stores.gcs.uploads import LIMITS, MultipartUploads

_GRANULE: Final = 256 << 10
"""Bytes that a session takes multiples of."""
_OF_SESSIONS: Final = PartLimits(min_size=_GRANULE, multiple=_GRANULE, in_order=True)
_URL: Final = ("http://", "https://")


class GCSStore(ObjectStore):
    """Objects below ``gs://bucket/prefix``.

    An upload is a multipart upload of the XML API. On a server without those it is a resumable session of the
    JSON API, whose id is the session's URL. Any process may go on with an upload of either kind, also where
    new uploads are of the other kind.

    A put with a condition is repeated when its answer is lost, like any request. So a
    ``PreconditionFailedError`` may mean that an earlier attempt of this very put won: the caller tells by the
    bytes of the object.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._requests = Requests(target)
        self._multipart = MultipartUploads(self._requests)

    def __reduce__(self) -> tuple[type[GCSStore], tuple[Target]]:
        return type(self), (self._target,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    @property
    def uri(self) -> str:
        return self._target.uri

    @property
    def is_remote(self) -> bool:
        return True

    @property
    def lists_at_once(self) -> bool:
        return True

    @property
    def part_limits(self) -> PartLimits:
        """Limits of the uploads that are used; probing a server other than Google's takes a few requests.

        Where ``part_size`` or ``memory_limit`` is less than the least part of a multipart upload, these are
        sessions, which take smaller parts.
        """
        return LIMITS if self._uses_multipart() else _OF_SESSIONS

    @property
    def part_checksum(self) -> str | None:
        """CRC32C, the one that GCS verifies, unless the options want none. A session takes none."""
        return self._multipart.checksum if self._uses_multipart() else None

    @property
    def capabilities(self) -> Capabilities:
        """Features that the server supports; probing one other than Google's takes a few requests, once."""
        supported = self._put_support()
        return Capabilities(conditional_create=supported.create, conditional_update=supported.update)

    @property
    def is_probed(self) -> bool:
        with explained(self._target, self._requests.client.route):
            return self._requests.client.is_google or server_of(self._requests).is_probed

    def probe(self) -> GCSCapabilities:
        """Return all that can be found out of the server, with more requests than a save needs."""
        with explained(self._target, self._requests.client.route):
            return server_of(self._requests).all(self._requests)

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        conditions = self._conditions(name, condition)
        return self._requests.ask(
            lambda client: gcs_write.insert(self._requests, client, name, data, conditions), name
        )

    def get(self, name: str) -> tuple[bytes, ObjectInfo]:
        return gcs_read.get(self._requests, name)

    def read_into(
        self,
        name: str,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        arrived: Arrived | None = None,
    ) -> int | None:
        return gcs_read.read_into(self._requests, name, offset, buffers, arrived)

    def stat(self, name: str) -> ObjectInfo:
        return gcs_read.stat(self._requests, name)

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        return gcs_read.listed(self._requests, prefix, delimiter=delimiter)

    def delete(self, names: Iterable[str]) -> None:
        delete_objects(self._requests, names)

    def begin_upload(self, name: str) -> Upload:
        if self._uses_multipart(name):
            return self._multipart.begin(name)
        url = self._requests.ask(lambda client: gcs_write.begin_session(self._requests, client, name), name)
        return Upload(name, url)

    def upload_part(
        self,
        upload: Upload,
        number: int,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        checksum: str | None = None,
        departed: Departed | None = None,
    ) -> Part:
        if not _is_session(upload):
            return self._multipart.part(upload, number, buffers, checksum, departed)
        sending = self._session(upload).part(offset, buffers, departed)
        try:
            self._requests.ask(sending.go_on, upload.name)
        except StatusUnknownError:
            self._supports_status(upload.name)
            self._requests.ask(sending.go_on, upload.name)
        return Part(number, sending.size, sending.tail, checksum)

    def complete_upload(self, upload: Upload, parts: Sequence[Part], *, confirm: bool = True) -> ObjectInfo:
        if not _is_session(upload):
            return self._multipart.complete(upload, parts, confirm=confirm)
        session, client = self._session(upload), self._requests.client
        with explained(self._target, client.route, upload.name):
            outcome = self._requests.outcome(session.ending(parts), on_behalf=True)
            if outcome.lost and isinstance(outcome.error, GoneError) and not client.is_google:
                # An ended session of Google's answers again; an emulator forgets it.
                info = self.stat(upload.name)
                if info.size == sum(part.size for part in parts):
                    return info
            if isinstance(outcome.error, WrongSizeError) and not self._supports_status(upload.name):
                # Such a server ends a session regardless of its bytes. One of Google's may have ended before.
                self._discard(upload.name, outcome.error.generation)
            return written_info(outcome.result(), self._requests.prefix, client.endpoint, upload.name)

    def abort_upload(self, upload: Upload) -> None:
        if not _is_session(upload):
            self._multipart.abort(upload)
            return
        self._requests.ask(self._session(upload).cancel, upload.name)

    def pending_uploads(self, prefix: str = "") -> Iterator[PendingUpload]:
        """List multipart uploads. GCS lists no sessions: they expire after a week, and cost nothing."""
        # The listing is asked for without a probe, which needs the permission to write.
        known = self._requests.client.serves_xml or server_of(self._requests).known_multipart
        return iter(()) if known is False else self._multipart.pending(prefix, is_known=known is True)

    def is_pending(self, upload: Upload) -> bool:
        """Look for an upload in a listing, and ask a session, if its URL is one of this bucket.

        Nothing is sent to any other URL.
        """
        if not _is_session(upload):
            return super().is_pending(upload)
        if not gcs_session.belongs(upload.upload_id, self._requests.client.endpoint, self._requests.bucket):
            return False
        if not self._supports_status(upload.name):
            return False  # no process can resume it
        return self._requests.ask(self._session(upload).is_open, upload.name)

    def copy_from(self, source: ObjectStore, info: ObjectInfo) -> ObjectInfo | None:
        if not isinstance(source, GCSStore):
            return None
        return copied(self._requests, source._requests, info)  # noqa: SLF001 - of this class

    def hold(self) -> None:
        self._requests.client.hold()

    def close(self) -> None:
        self._requests.close()

    def _session(self, upload: Upload) -> Session:
        return Session(server_of(self._requests), upload.upload_id)

    def _uses_multipart(self, name: str | None = None) -> bool:
        """Return True if new uploads are multipart uploads."""
        options = self._target.options
        least = min(options.part_size or LIMITS.min_size, options.memory_limit)
        return least >= LIMITS.min_size and self._has_multipart(name)

    def _has_multipart(self, name: str | None = None) -> bool:
        """Return True if the server has the multipart uploads of the XML API."""
        with explained(self._target, self._requests.client.route, name):
            return server_of(self._requests).multipart(self._requests)

    def _supports_status(self, name: str) -> bool:
        """Return True if a session may be asked how many bytes it holds."""
        with explained(self._target, self._requests.client.route, name):
            return server_of(self._requests).upload_status(self._requests)

    def _discard(self, name: str, generation: str | None) -> None:
        self._requests.ask(lambda client: gcs_write.delete(self._requests, client, name, generation), name)

    def _put_support(self, name: str | None = None) -> PutSupport:
        with explained(self._target, self._requests.client.route, name):
            return server_of(self._requests).put(self._requests)

    def _conditions(self, name: str, condition: Condition) -> dict[str, str]:
        match condition:
            case Overwrite():
                return {}
            case Create():
                supported, generation = self._put_support(name).create, "0"
            case Update(version):
                supported, generation = self._put_support(name).update, version
        if not supported:
            raise ConfigurationError(
                "the server does not support ifGenerationMatch, the condition of this put",
                uri=self.uri,
                object_name=name,
                hint="Put without a condition, or use a server that supports it; see `cloudckpt doctor`",
            )
        return {"ifGenerationMatch": generation}


def _is_session(upload: Upload) -> bool:
    """Return True for a resumable session, whose id is a URL; that of a multipart upload never is."""
    return upload.upload_id.startswith(_URL)
