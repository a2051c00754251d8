"""Requests of the S3 store: made with the current clients, and retried where that may help."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import urllib3.exceptions

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import AccessDeniedError, CheckpointError
from cloudckpt.backends.stores.failure_causes import Route, ended_cure, readable, words
from cloudckpt.backends.stores.retry import Outcome, Retries
from cloudckpt.backends.stores.s3.client import SETTINGS, Clients
from cloudckpt.backends.stores.s3.errors import BrokenBodyError, explained
from cloudckpt.backends.stores.s3.shared import SharedClients
from cloudckpt.backends.stores.s3.verdict import judge

_T = TypeVar("_T")

_TIMEOUTS: Final = 5
"""MemoryBudget of a request, in timeouts."""
_LEAST_SECONDS: Final = 30.0
"""What the budget is at least: back-off alone may take that long."""
_SLOWEST: Final = 256 << 10
"""Bytes a second: so long as a request takes to carry its bytes at this pace, so much longer is its budget.
One of 128 MiB may take all of five timeouts on a slow line, and has a second try even so."""
_PATIENT_TIMEOUTS: Final = 15
"""That of CompleteMultipartUpload, one attempt of which may take ten."""


class Requests:
    """Makes the requests of one store. Safe to use from several threads, and in a process that was forked."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._shared = SharedClients(target)

    @property
    def clients(self) -> Clients:
        """The clients of the moment, for what is not a request."""
        return self._shared.get()

    def ask(self, act: Callable[[Clients], _T], name: str | None = None, *, nbytes: int = 0) -> _T:
        """Return what ``act`` does with the clients, which may take several attempts.

        It carries ``nbytes`` one way or the other.

        Raises:
            StorageError: with the object's ``name``, where there is one.
        """
        with self.explained(name):
            return self.outcome(act, nbytes=nbytes).result()

    def outcome(
        self,
        act: Callable[[Clients], _T],
        *,
        patient: bool = False,
        on_behalf: bool = False,
        nbytes: int = 0,
    ) -> Outcome[_T]:
        """Return how it ended, for a caller to which it matters.

        ``patient`` says that ``act`` is so, and ``on_behalf`` that it is one of many for other ranks. ``act``
        must not make another request through here. The error is the client's own: see ``explained``.
        """
        options, used = self._target.options, self._shared.get()
        usual = options.timeout * (_PATIENT_TIMEOUTS if patient else _TIMEOUTS)
        retries = Retries(
            judge,
            used.paces.on_behalf if on_behalf else used.paces.transfers,
            f"{used.endpoint}/{self._target.bucket}",
            retries=options.retries,
            seconds=max(_LEAST_SECONDS, usual) + nbytes / _SLOWEST,
        )

        def attempt() -> _T:
            nonlocal used
            used = self._shared.get()
            try:
                return readable(lambda: act(used), used.route)
            except urllib3.exceptions.HTTPError as error:  # botocore reads errors of GetObject unguarded
                said = f"the answer of {used.route} broke off while it was read ({words(error)})"
                raise BrokenBodyError(said, hint=ended_cure(used.route)) from error

        return retries.outcome(attempt, renew=lambda: self._shared.renew(used))

    @contextlib.contextmanager
    def explained(self, name: str | None = None) -> Iterator[None]:
        """Explain what goes wrong in the block, with the object's ``name``."""
        with explained(self._target, Route(self._target.options.endpoint_url or "S3", SETTINGS), name):
            clients = self._shared.get()
        with explained(self._target, clients.route, name):
            try:
                yield
            except RuntimeError as error:  # which is all that botocore raises then
                if isinstance(error, CheckpointError) or not clients.has_expired:
                    raise
                raise AccessDeniedError(
                    "the AWS credentials have expired, and no newer ones are found",
                    hint="Set new ones, or use a role or a login that renews them by itself",
                ) from error

    def close(self) -> None:
        """Let connections go; the next request makes new ones."""
        self._shared.close()
