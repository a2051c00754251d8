"""Deleting objects on GCS: by batches, and one by one on a server that has no batch endpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Final

from cloudckpt.backends.stores.gcs import batch_delete as gcs_batch
from cloudckpt.backends.stores.gcs.answers import lacking
from cloudckpt.backends.stores.gcs.capabilities import server_of
from cloudckpt.backends.stores.gcs.client import Client
from cloudckpt.backends.stores.gcs.errors import RefusedError, explained, judge, status_of
from cloudckpt.backends.stores.gcs.requests import Requests
from cloudckpt.backends.stores.gcs.write import delete
from cloudckpt.backends.stores.http.connections import BrokenOffError
from cloudckpt.backends.stores.retry import Verdict
from cloudckpt.backends.transfer.task_pool import run_all

_NO_BATCHES: Final = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.NOT_IMPLEMENTED,
)
"""Answers of a server without a batch endpoint. Google's storage-testbench gives the third."""


def delete_objects(requests: Requests, names: Iterable[str]) -> None:
    """Delete objects; a name without an object is no error.

    Raises:
        StorageError: an object could not be deleted.
    """
    remaining = iter(names)
    while batch := list(itertools.islice(remaining, gcs_batch.AT_ONCE)):
        server = server_of(requests)
        if server.deletes_in_batches:
            deletion = _Batch(requests, batch)
            outcome = requests.outcome(deletion.send)
            if requests.client.is_google or status_of(outcome.error) not in _NO_BATCHES:
                deletion.check(outcome.error)
                continue
        run_all([_single(requests, name) for name in batch], requests.target.options.concurrency)
        server.deletes_in_batches = False


def _single(requests: Requests, name: str) -> Callable[[], None]:
    return lambda: requests.ask(lambda client: delete(requests, client, name), name)


class _Batch:
    """The deletion of some objects, of which each attempt sends those that are left."""

    def __init__(self, requests: Requests, names: Iterable[str]) -> None:
        self._requests = requests
        self._left = [*names]
        self._refused: tuple[str, RefusedError] | None = None

    def send(self, client: Client) -> None:
        """Make one attempt."""
        query = client.always and f"?{client.always}"
        paths = [self._requests.path(client, name) + query for name in self._left]
        kind, body = gcs_batch.deletions(paths)
        answer = client.request(
            "delete", "POST", "/batch/storage/v1", headers={"Content-Type": kind}, body=body
        )
        try:
            results = gcs_batch.answers(answer.headers.get("Content-Type", ""), answer.data, len(paths))
        except ValueError as error:
            raise lacking("the answers to a batch", client.endpoint) from error
        failed = {
            self._left[number]: RefusedError("delete", status, said)
            for number, (status, said) in sorted(results.items())
            if not 200 <= status < 300 and status != HTTPStatus.NOT_FOUND  # noqa: PLR2004 - success
        }
        # One that was not answered counts as not deleted.
        self._left = [
            name for number, name in enumerate(self._left) if name in failed or number not in results
        ]
        final = [name for name, error in failed.items() if judge(error).verdict is Verdict.FINAL]
        if final:
            self._refused = (final[0], failed[final[0]])
            return
        for passing in failed.values():
            raise passing
        if self._left:
            raise BrokenOffError

    def check(self, error: Exception | None) -> None:
        """Raise the error that deletion ended with, if any.

        Raises:
            StorageError: with the name of the object, where one was refused.
        """
        name, refused = self._refused or (None, error)
        if refused is not None:
            with explained(self._requests.target, self._requests.client.route, name):
                raise refused
