"""Features that a GCS server supports, found by probing, and remembered for the process.

Google's own endpoint is not probed. Any other server is, once a process and bucket: emulators differ in
conditions, and some take a parameter without acting on it. So each condition is tried twice: once where it
holds, which the server must accept, and once where it does not, which the server must refuse.

Each group of features is probed when it is first needed, with hidden objects below the store's prefix, which
the probe deletes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

from cloudckpt.backends.checksums import CRC32C
from cloudckpt.backends.stores.base import ObjectInfo, Upload
from cloudckpt.backends.stores.gcs import multipart as gcs_multipart
from cloudckpt.backends.stores.gcs.answers import document
from cloudckpt.backends.stores.gcs.client import Client
from cloudckpt.backends.stores.gcs.errors import CANCELLED, status_of
from cloudckpt.backends.stores.gcs.requests import Requests
from cloudckpt.backends.stores.gcs.write import begin_session, delete, insert
from cloudckpt.backends.stores.object_names import probe_name
from cloudckpt.backends.stores.retry import Outcome
from cloudckpt.backends.system import background_log
from cloudckpt.backends.system.printable import one_line

_log = background_log.logger(__name__)

_MORE: Final = int(HTTPStatus.PERMANENT_REDIRECT)
_AGAIN: Final = 2
"""Times that a condition is tried again where an attempt before may have won, for its answer was lost."""
_REFUSED: Final = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.PRECONDITION_FAILED,
    HTTPStatus.NOT_IMPLEMENTED,
)
_PROBE: Final = b"probe"
_NO_SESSION: Final = (*_REFUSED, HTTPStatus.NOT_FOUND, HTTPStatus.GONE, CANCELLED)


@dataclass(frozen=True, slots=True)
class PutSupport:
    """Conditions that a server supports on an insert."""

    create: bool
    """``ifGenerationMatch=0`` refuses an insert where an object exists, and no other."""
    update: bool
    """``ifGenerationMatch`` accepts the object's generation and refuses another."""


@dataclass(frozen=True, slots=True)
class GCSCapabilities:
    """All that was probed of one server, for ``doctor`` and the documentation."""

    put: PutSupport
    copy_source: bool
    """``ifSourceGenerationMatch`` on a rewrite."""
    upload_status: bool
    """A session says how many bytes it holds, and stays open."""
    multipart: bool
    """Multipart uploads of the XML API, which can be listed and aborted."""


_GOOGLE: Final = PutSupport(create=True, update=True)


class Server:
    """One bucket's server, as this process has found it. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._put: PutSupport | None = None
        self._copy: bool | None = None
        self.known_multipart: bool | None = None
        """The last answer of ``multipart``, None before the first. It may be read within an attempt."""
        self.known_upload_status: bool | None = None
        """The last answer of ``upload_status``, None before the first. It may be read within an attempt."""
        self.deletes_in_batches = True
        """False once the server has refused a batch and taken single deletions."""

    def put(self, requests: Requests) -> PutSupport:
        """Return the conditions that the server supports on an insert; probing takes five requests, once."""
        if requests.client.is_google:
            return _GOOGLE
        with self._lock:
            if self._put is None:
                with _Probe(requests).cleaned_up() as probe:
                    self._put = probe.put_support()
            return self._put

    @property
    def is_probed(self) -> bool:
        """True if `put` answers without a request."""
        return self._put is not None

    def copy_source(self, requests: Requests) -> bool:
        """Return True if a rewrite supports ``ifSourceGenerationMatch``; probing takes six requests."""
        if requests.client.is_google:
            return True
        with self._lock:
            if self._copy is None:
                with _Probe(requests).cleaned_up() as probe:
                    self._copy = probe.copy_source()
            return self._copy

    def upload_status(self, requests: Requests) -> bool:
        """Return True if a session may be asked how many bytes it holds; probing takes three requests, once.

        fake-gcs-server takes that for the end of the upload. gcp-storage-emulator says that a session without
        bytes holds one.
        """
        if requests.client.is_google:
            return True
        with self._lock:
            if self.known_upload_status is None:
                with _Probe(requests).cleaned_up() as probe:
                    self.known_upload_status = probe.upload_status()
            return self.known_upload_status

    def multipart(self, requests: Requests) -> bool:
        """Return True if the server has the multipart uploads of the XML API; probing takes four requests."""
        if requests.client.serves_xml:
            return True
        with self._lock:
            if self.known_multipart is None:
                with _Probe(requests).cleaned_up() as probe:
                    self.known_multipart = probe.multipart()
            return self.known_multipart

    def all(self, requests: Requests) -> GCSCapabilities:
        """Return all of the above."""
        return GCSCapabilities(
            self.put(requests),
            self.copy_source(requests),
            self.upload_status(requests),
            self.multipart(requests),
        )


_servers: dict[tuple[int, str, str], Server] = {}
_lock = threading.Lock()


def server_of(requests: Requests) -> Server:
    """Return the record of a bucket's server in this process."""
    place = (os.getpid(), requests.client.endpoint, requests.bucket)
    with _lock:
        return _servers.setdefault(place, Server())


def forget_servers() -> None:
    """Forget every server, so that the next use probes it again."""
    with _lock:
        _servers.clear()


class _Probe:
    """Requests that try one server, and the hidden objects that they leave."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._names: list[str] = []

    @contextmanager
    def cleaned_up(self) -> Iterator[_Probe]:
        """Delete the objects of the probe when the block ends.

        An object that can't be deleted is logged: a job without that permission can save even so.
        """
        try:
            yield self
        finally:
            for name in self._names:
                if error := self._delete(name).error:
                    place = f"gs://{self._requests.bucket}/{self._requests.prefix}{name}"
                    _log.warning("%s: a probe could not be deleted: %s", one_line(place), one_line(error))

    def put_support(self) -> PutSupport:
        """Try the conditions of an insert on one object."""
        name, create = self._created()
        generation = _generation(self._put(name))
        right = self._put(name, ifGenerationMatch=generation)
        for _ in range(_AGAIN):
            if right.lost and _is_precondition(right):
                generation = _generation(self._put(name))
                right = self._put(name, ifGenerationMatch=generation)
        if _is_refused(right):
            return PutSupport(create, update=False)
        # The generation before is that of no object now.
        update = _generation(right) != generation and _is_precondition(
            self._put(name, ifGenerationMatch=generation)
        )
        return PutSupport(create, update)

    def copy_source(self) -> bool:
        """Try the condition of a copy with a wrong generation and with the right one."""
        name, copy = self._new_name(), self._new_name()
        before = _generation(self._put(name))
        generation = _generation(self._put(name))
        wrong = self._rewrite(name, copy, before)
        return _is_precondition(wrong) and not _is_refused(self._rewrite(name, copy, generation))

    def upload_status(self) -> bool:
        """Begin a session without bytes, ask it how many it holds, and cancel it."""
        name = self._new_name()
        url = self._requests.outcome(lambda client: begin_session(self._requests, client, name)).result()
        status, held = self._requests.outcome(lambda client: _status_of(url, client)).result()
        if status == _MORE:
            self._names.remove(name)  # it never was an object
            self._requests.outcome(lambda client: _cancel(url, client)).result()
        return status == _MORE and not held

    def multipart(self) -> bool:
        """Begin an upload, send it a part, find it in a listing, and abort it."""
        requests, name = self._requests, probe_name()
        started = requests.outcome(lambda client: gcs_multipart.begin(requests, client, name))
        if started.error is not None:
            self._names.append(name)  # a server that knows no uploads may have put an object
            return not gcs_multipart.is_unsupported(started.error)
        upload, checksum = Upload(name, started.result()), CRC32C.text(CRC32C.of(_PROBE))
        sent = requests.outcome(
            lambda client: gcs_multipart.put_part(
                requests, client, upload, 1, [memoryview(_PROBE)], checksum=checksum, departed=None
            )
        )
        found = requests.outcome(lambda client: gcs_multipart.listed(requests, client, name, {}))
        # More than one where the answer to the first begin was lost.
        listed = [one.upload for one in found.value.uploads] if found.value is not None else []
        ended = [self._aborted(one) for one in {upload, *listed}]
        for error in (sent.error, found.error, *(one.error for one in ended)):
            if error is not None and gcs_multipart.is_unsupported(error):
                self._names.append(name)
                return False
        return upload in listed

    def _aborted(self, upload: Upload) -> Outcome[bool]:
        return self._requests.outcome(lambda client: gcs_multipart.abort(self._requests, client, upload))

    def _created(self) -> tuple[str, bool]:
        """Return the name of an object that exists now, and whether the server supports its creation."""
        name = self._new_name()
        created = self._put(name, ifGenerationMatch="0")
        for _ in range(_AGAIN):
            if created.lost and _is_precondition(created):
                name = self._new_name()
                created = self._put(name, ifGenerationMatch="0")
        refused = _is_refused(created)
        return name, not refused and _is_precondition(self._put(name, ifGenerationMatch="0"))

    def _put(self, name: str, **condition: str) -> Outcome[ObjectInfo]:
        requests = self._requests
        return requests.outcome(lambda client: insert(requests, client, name, b"probe", condition))

    def _rewrite(self, name: str, copy: str, generation: str) -> Outcome[dict[str, Any]]:
        requests = self._requests
        there = f"rewriteTo/b/{quote(requests.bucket, safe='')}/o/{quote(requests.prefix + copy, safe='')}"

        def rewrite(client: Client) -> dict[str, Any]:
            path, parameters = (
                f"{requests.path(client, name)}/{there}",
                {"ifSourceGenerationMatch": generation},
            )
            answer = client.request("copy", "POST", path, parameters=parameters, body=b"")
            return document(answer, client.endpoint)

        return requests.outcome(rewrite)

    def _new_name(self) -> str:
        self._names.append(probe_name())
        return self._names[-1]

    def _delete(self, name: str) -> Outcome[None]:
        return self._requests.outcome(lambda client: delete(self._requests, client, name))


def _status_of(url: str, client: Client) -> tuple[int, str]:
    """Ask a session how many bytes it holds; return the status of the answer and its range."""
    fine = (_MORE, *_NO_SESSION)
    headers = {"Content-Range": "bytes */*"}
    answer = client.request("upload", "PUT", url, headers=headers, body=b"", fine=fine)
    answer.drain_conn()
    answer.release_conn()
    return answer.status, answer.headers.get("Range", "")


def _cancel(url: str, client: Client) -> None:
    answer = client.request("abort an upload", "DELETE", url, body=b"", fine=_NO_SESSION)
    answer.drain_conn()
    answer.release_conn()


def _is_refused(outcome: Outcome[Any]) -> bool:
    """Return True if the server refused a request for what it asked.

    Raises:
        Exception: it failed for another reason, such as credentials.
    """
    if outcome.error is None:
        return False
    if status_of(outcome.error) not in _REFUSED:
        raise outcome.error
    return True


def _is_precondition(outcome: Outcome[Any]) -> bool:
    """Return True if the server refused a request for its condition."""
    return _is_refused(outcome) and status_of(outcome.error) == HTTPStatus.PRECONDITION_FAILED


def _generation(outcome: Outcome[ObjectInfo]) -> str:
    """Return the generation of the object that was put."""
    return outcome.result().version or ""
