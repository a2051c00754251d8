"""Deleting S3 objects: by DeleteObjects, and one by one on a server that has no such request.

Google Cloud Storage's S3 interface and older Ceph have no DeleteObjects, and others refuse its form. A server
that refuses it is sent DeleteObject for each key. Once those succeed, this process sends the server no
DeleteObjects any more.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from botocore.exceptions import ClientError

from cloudckpt.backends.errors import AccessDeniedError
from cloudckpt.backends.stores.s3.capabilities import Server
from cloudckpt.backends.stores.s3.client import Clients
from cloudckpt.backends.stores.s3.codes import WRONG_REGION, quoted
from cloudckpt.backends.stores.s3.errors import NotDeletedError, code_of, is_of_credentials, status_of
from cloudckpt.backends.stores.s3.requests import Requests
from cloudckpt.backends.transfer.task_pool import run_all

_BATCH: Final = 1000
"""Keys that one DeleteObjects takes."""
_DENIED: Final = ("AccessDenied", "AllAccessDisabled")


class Deleter:
    """Deletes objects of one bucket.

    Args:
        requests: the store's.
        server: the record of the bucket's server.
        bucket: name of the bucket.
        prefix: prefix of keys, which names in errors are without.
        concurrency: requests in flight where keys are deleted one by one.
    """

    def __init__(
        self, requests: Requests, server: Server, bucket: str, prefix: str, concurrency: int
    ) -> None:
        self._requests = requests
        self._server = server
        self._bucket = bucket
        self._prefix = prefix
        self._concurrency = concurrency

    def delete(self, names: Iterable[str]) -> None:
        """Delete the objects with these names; a name without an object is no error.

        Raises:
            StorageError: an object could not be deleted.
        """
        keys = (self._prefix + name for name in names)
        while batch := list(itertools.islice(keys, _BATCH)):
            if self._server.deletes_in_batches:
                outcome = self._requests.outcome(functools.partial(self._delete_objects, batch))
                if not _may_lack_batches(outcome.error):
                    unnamed = outcome.result()
                    self._delete_each(unnamed)
                    self._server.deletes_in_batches = len(unnamed) < len(batch)
                    continue
            self._delete_each(batch)
            self._server.deletes_in_batches = False

    def _delete_objects(self, keys: Sequence[str], clients: Clients) -> list[str]:
        """Delete keys, and return those that the answer does not name: they may still be there."""
        listed = {"Objects": [{"Key": key} for key in keys]}
        arguments = clients.arguments("delete_objects", Bucket=self._bucket, Delete=listed)
        answer = clients.data.delete_objects(**arguments)
        if failures := answer.get("Errors"):
            raise self._not_deleted(failures)
        named = {deleted.get("Key") for deleted in answer.get("Deleted", ())}
        return [key for key in keys if key not in named]

    def _delete_each(self, keys: Sequence[str]) -> None:
        def deletion(key: str) -> Callable[[], None]:
            return lambda: self._requests.ask(
                functools.partial(self._delete_object, key), key.removeprefix(self._prefix)
            )

        if not keys:
            return
        if len(keys) == 1:  # without a pool of threads, which an interpreter that exits starts no more
            deletion(keys[0])()
        else:
            run_all([deletion(key) for key in keys], self._concurrency)

    def _delete_object(self, key: str, clients: Clients) -> None:
        try:
            clients.data.delete_object(**clients.arguments("delete_object", Bucket=self._bucket, Key=key))
        except ClientError as error:
            # Google Cloud Storage answers so to a key without an object, where S3 answers 204.
            if code_of(error) != "NoSuchKey":
                raise

    def _not_deleted(self, failures: Sequence[Mapping[str, Any]]) -> AccessDeniedError | NotDeletedError:
        first = failures[0]
        code, key = first.get("Code", "no code"), str(first.get("Key", ""))
        denied = code in _DENIED
        number = "an object was" if len(failures) == 1 else f"{len(failures):,} objects were"
        error = (AccessDeniedError if denied else NotDeletedError)(
            f"{number} not deleted ({quoted(code, first.get('Message'))})",
            object_name=key.removeprefix(self._prefix),
            hint="The credentials need s3:DeleteObject here, and no lock or policy may protect the object"
            if denied
            else None,
        )
        if isinstance(error, NotDeletedError):
            error.code = code
        return error


def _may_lack_batches(error: Exception | None) -> bool:
    """Return True for an answer with which a server may refuse DeleteObjects itself."""
    if not isinstance(error, ClientError) or is_of_credentials(error):
        return False
    if code_of(error) in WRONG_REGION or code_of(error) == "NoSuchBucket":
        return False
    return status_of(error) in (
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.METHOD_NOT_ALLOWED,
        HTTPStatus.LENGTH_REQUIRED,
        HTTPStatus.NOT_IMPLEMENTED,
    )
