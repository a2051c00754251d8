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

from cloudckpt.backends.store import ObjectInfo
from cloudckpt.backends.stores.gcs_answers import document
from cloudckpt.backends.stores.gcs_client import Client
from cloudckpt.backends.stores.gcs_errors import CANCELLED, status_of
from cloudckpt.backends.stores.gcs_requests import Requests
from cloudckpt.backends.stores.gcs_write import begin_session, delete, insert
from cloudckpt.backends.stores.names import probe_name
from cloudckpt.backends.stores.retry import Outcome

_MORE: Final = int(HTTPStatus.PERMANENT_REDIRECT)
_TRIES: Final = 3
"""Probes of one condition, where the first attempt of a put may have won and its answer was lost."""
_REFUSED: Final = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.PRECONDITION_FAILED,
    HTTPStatus.NOT_IMPLEMENTED,
)
_NOT_CANCELLED: Final = (*_REFUSED, HTTPStatus.NOT_FOUND, HTTPStatus.GONE, CANCELLED)


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


_GOOGLE: Final = PutSupport(create=True, update=True)


class Server:
    """One bucket's server, as this process has found it. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._put: PutSupport | None = None
        self._copy: bool | None = None
        self._status: bool | None = None
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

    def copy_source(self, requests: Requests) -> bool:
        """Return True if a rewrite supports ``ifSourceGenerationMatch``; probing takes six requests."""
        if requests.client.is_google:
            return True
        with self._lock:
            if self._copy is None:
                with _Probe(requests).cleaned_up() as probe:
                    self._copy = probe.copy_source()
            return self._copy

    def upload_status(self, requests: Requests, client: Client) -> bool:
        """Return True if a session may be asked how many bytes it holds.

        fake-gcs-server takes that for the end of the upload. gcp-storage-emulator says that a session without
        bytes holds one. The probe takes three requests, once. It is part of the caller's attempt, so that it
        may be called within one.

        Raises:
            RefusedError: a request of the probe failed.
        """
        if client.is_google:
            return True
        with self._lock:
            if self._status is None:
                self._status = _upload_status(requests, client)
            return self._status

    def all(self, requests: Requests) -> GCSCapabilities:
        """Return all of the above."""
        status = requests.outcome(lambda client: self.upload_status(requests, client)).result()
        return GCSCapabilities(self.put(requests), self.copy_source(requests), status)


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

        Raises:
            RefusedError: the block succeeded, and an object could not be deleted.
        """
        try:
            yield self
        except BaseException:
            for name in self._names:
                self._delete(name)
            raise
        for name in self._names:
            self._delete(name).result()

    def put_support(self) -> PutSupport:
        """Try the conditions of an insert on one object."""
        name, create = self._created()
        generation = _generation(self._put(name))
        for _ in range(_TRIES):
            right = self._put(name, ifGenerationMatch=generation)
            if not (right.lost and _is_precondition(right)):
                break
            generation = _generation(self._put(name))
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

    def _created(self) -> tuple[str, bool]:
        """Return the name of an object that exists now, and whether the server supports its creation."""
        for _ in range(_TRIES):
            name = self._new_name()
            created = self._put(name, ifGenerationMatch="0")
            if not _is_refused(created):
                return name, _is_precondition(self._put(name, ifGenerationMatch="0"))
            if not created.lost:
                break
        return name, False

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


def _upload_status(requests: Requests, client: Client) -> bool:
    """Begin a session, ask it how many bytes it holds, and remove it."""
    name = probe_name()
    url = begin_session(requests, client, name)
    headers, fine = {"Content-Range": "bytes */*"}, (_MORE, *_REFUSED)
    try:
        answer = client.request("upload", "PUT", url, headers=headers, body=b"", fine=fine)
        answer.drain_conn()
        answer.release_conn()
    except BaseException:
        delete(requests, client, name)  # which the session may be by now
        raise
    if answer.status != _MORE:
        delete(requests, client, name)
        return False
    cancelled = client.request("abort an upload", "DELETE", url, body=b"", fine=_NOT_CANCELLED)
    cancelled.drain_conn()
    cancelled.release_conn()
    return "Range" not in answer.headers


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
