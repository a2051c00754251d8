"""Objects in a bucket of Google Cloud Storage, by its JSON API."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.store import (
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
from cloudckpt.backends.stores import gcs_read, gcs_session, gcs_write
from cloudckpt.backends.stores.gcs_answers import object_info
from cloudckpt.backends.stores.gcs_capabilities import GCSCapabilities, PutSupport, server_of
from cloudckpt.backends.stores.gcs_copy import copied
from cloudckpt.backends.stores.gcs_delete import delete_objects
from cloudckpt.backends.stores.gcs_errors import explained
from cloudckpt.backends.stores.gcs_requests import Requests
from cloudckpt.backends.stores.gcs_session import GoneError, Session, StatusUnknownError, WrongSizeError
from cloudckpt.backends.target import Target

_GRANULE: Final = 256 << 10
"""Bytes that a session takes multiples of."""


class GCSStore(ObjectStore):
    """Objects below ``gs://bucket/prefix``.

    An upload is a resumable session: its id is the session's URL, with which any process may go on. A put
    with a condition is repeated when its answer is lost, like any request. So a ``PreconditionFailedError``
    may mean that an earlier attempt of this very put won: the caller tells by the bytes of the object.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._requests = Requests(target)

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
    def part_limits(self) -> PartLimits:
        return PartLimits(min_size=_GRANULE, multiple=_GRANULE, in_order=True)

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
        sending = self._session(upload).part(offset, buffers, departed)
        try:
            self._requests.ask(sending.go_on, upload.name)
        except StatusUnknownError:
            self._supports_status(upload.name)
            self._requests.ask(sending.go_on, upload.name)
        return Part(number, sending.size, sending.tail, checksum)

    def complete_upload(self, upload: Upload, parts: Sequence[Part], *, confirm: bool = True) -> ObjectInfo:
        del confirm  # the answer says all there is to know
        session, client = self._session(upload), self._requests.client
        with explained(self._target, client.route, upload.name):
            outcome = self._requests.outcome(session.ending(parts), on_behalf=True)
            if outcome.lost and isinstance(outcome.error, GoneError) and not client.is_google:
                # An ended session of Google's answers again; an emulator forgets it.
                info = self.stat(upload.name)
                if info.size == sum(part.size for part in parts):
                    return info
            if isinstance(outcome.error, WrongSizeError) and not self._supports_status(upload.name):
                # Such a server ends a session whatever it holds. One of Google's may have ended before.
                self._discard(upload.name, outcome.error.generation)
            return object_info(outcome.result(), self._requests.prefix, client.endpoint)

    def abort_upload(self, upload: Upload) -> None:
        self._requests.ask(self._session(upload).cancel, upload.name)

    def pending_uploads(self, prefix: str = "") -> Iterator[PendingUpload]:
        """Return nothing: GCS lists no sessions. They expire after a week, and cost nothing until then."""
        del prefix
        return iter(())

    def is_pending(self, upload: Upload) -> bool:
        """Ask the session, if its URL is one of this bucket: nothing is sent to any other."""
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
