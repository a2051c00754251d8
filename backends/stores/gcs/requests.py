"""Make the requests of a GCS store on the client of this process, with retries."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Final, TypeVar
from urllib.parse import quote

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import AccessDeniedError, ObjectNotFoundError
from cloudckpt.backends.stores.failure_causes import Route, readable
from cloudckpt.backends.stores.gcs.answers import check_listing, document, entries
from cloudckpt.backends.stores.gcs.client import Client
from cloudckpt.backends.stores.gcs.errors import SETTINGS, RefusedError, explained, foreign, judge, status_of
from cloudckpt.backends.stores.retry import Outcome, Retries

_T = TypeVar("_T")

_TIMEOUTS: Final = 5
"""MemoryBudget of a request, in timeouts."""
_LEAST_SECONDS: Final = 30.0


class Requests:
    """Makes the requests of one store. Safe to use from several threads, and in a process that was forked."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.bucket = target.bucket
        self.prefix = f"{target.path}/" if target.path else ""
        """Prefix of the names of the store's objects."""
        self._lock = threading.Lock()
        self._held: tuple[int, Client] | None = None

    @property
    def client(self) -> Client:
        """The client of this process.

        Raises:
            ConfigurationError: an option can't be used.
            AccessDeniedError: no credentials were found.
        """
        with explained(self.target, Route(self.target.options.endpoint_url or "GCS", SETTINGS)), self._lock:
            if self._held is None or self._held[0] != os.getpid():
                self._held = (os.getpid(), Client(self.target))
            return self._held[1]

    def ask(self, act: Callable[[Client], _T], name: str | None = None, *, on_behalf: bool = False) -> _T:
        """Return the value of ``act``, which may take several attempts.

        Args:
            act: one attempt. It must not make another request through here.
            name: of the object that errors are about.
            on_behalf: it is one of many requests for other ranks.

        Raises:
            StorageError: with the object's ``name``, where there is one.
        """
        with explained(self.target, self.client.route, name):
            return self.outcome(act, on_behalf=on_behalf).result()

    def read(self, act: Callable[[Client], _T], name: str) -> _T:
        """Return the value of ``act``, which reads an object.

        GCS answers 403 for a missing object to an account that may not list, and to one whose permission to
        list has a condition. So after a 403 the object is looked for in a listing of its name.

        Raises:
            ObjectNotFoundError: there is no such object.
            AccessDeniedError: the account may not read it, or may neither read it nor list.
        """
        outcome = self.outcome(act)
        with explained(self.target, self.client.route, name):
            if status_of(outcome.error) == HTTPStatus.FORBIDDEN:
                listed = self.outcome(self._listing(name))
                if (
                    isinstance(outcome.error, RefusedError)
                    and status_of(listed.error) == HTTPStatus.FORBIDDEN
                ):
                    raise AccessDeniedError(
                        f"GCS denied to {outcome.error.doing} and to list: {outcome.error.message}",
                        hint=f"The account needs storage.objects.get on the bucket {self.bucket!r}, "
                        "and storage.objects.list to tell a missing object from a denied one"
                        f"{foreign(outcome.error, self.client.route)}",
                    ) from outcome.error
                if not listed.result():
                    raise ObjectNotFoundError("no such object") from outcome.error
            return outcome.result()

    def outcome(self, act: Callable[[Client], _T], *, on_behalf: bool = False) -> Outcome[_T]:
        """Return how a request ended, for a caller to which it matters. The error is not explained."""
        options, client = self.target.options, self.client
        retries = Retries(
            judge,
            client.paces.on_behalf if on_behalf else client.paces.transfers,
            f"{client.endpoint}/{self.bucket}",
            retries=options.retries,
            seconds=max(_LEAST_SECONDS, options.timeout * _TIMEOUTS),
        )
        return retries.outcome(lambda: readable(lambda: act(client), client.route), renew=client.renew)

    def path(self, client: Client, name: str) -> str:
        """Return the path of an object on the endpoint."""
        return f"{client.objects(self.bucket)}/{quote(self.prefix + name, safe='')}"

    def resource(self, name: str) -> dict[str, str]:
        """Return the resource of an object that is to be written."""
        storage_class = self.target.options.storage_class
        return {"name": self.prefix + name, **({"storageClass": storage_class} if storage_class else {})}

    @property
    def writing(self) -> dict[str, str]:
        """The parameters of every request that writes an object."""
        key = self.target.options.kms_key_name
        return {"kmsKeyName": key} if key else {}

    @property
    def writing_headers(self) -> dict[str, str]:
        """The headers of a request of the XML API that begins an object."""
        options = self.target.options
        given = {
            "x-goog-storage-class": options.storage_class,
            "x-goog-encryption-kms-key-name": options.kms_key_name,
        }
        return {name: value for name, value in given.items() if value}

    def close(self) -> None:
        """Let connections go; the next request makes new ones."""
        with self._lock:
            held, self._held = self._held, None
        if held is not None and held[0] == os.getpid():
            held[1].close()

    def _listing(self, name: str) -> Callable[[Client], bool]:
        # In the order of names the object comes first of all whose names begin with its own.
        full = self.prefix + name
        parameters = {"prefix": full, "maxResults": "1", "fields": "kind,items(name)"}

        def lists(client: Client) -> bool:
            answer = client.request("list", "GET", client.objects(self.bucket), parameters=parameters)
            page = document(answer, client.endpoint)
            check_listing(page, client.endpoint)
            return any(item.get("name") == full for item in entries(page, "items", dict, client.endpoint))

        return lists
