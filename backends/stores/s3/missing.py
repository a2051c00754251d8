"""Tell a missing object from a denied one where S3 answers both with 403.

S3 answers a GET or HEAD of a missing object with 404 only to a caller who has ``s3:ListBucket`` for that very
request. A grant under a condition on ``s3:prefix`` does not count, because the context of a GetObject has no
such key. So a 403 to a read is followed by a listing, with the object's key as prefix. The key sorts before
every longer key that begins with it, so the listing needs one key.

Nothing is remembered: another object may have another answer, and a policy may change at any time. A read
that is not denied makes no further request.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import TypeVar

from botocore.exceptions import ClientError

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import ObjectNotFoundError
from cloudckpt.backends.stores.retry import Outcome
from cloudckpt.backends.stores.s3.client import Clients
from cloudckpt.backends.stores.s3.errors import denial, is_denial, not_s3, status_of
from cloudckpt.backends.stores.s3.requests import Requests

_T = TypeVar("_T")


def read_object(
    requests: Requests, target: Target, name: str, act: Callable[[Clients], _T], *, nbytes: int = 0
) -> _T:
    """Return the result of ``act``, a GET or HEAD of the object ``name`` that carries ``nbytes``.

    Raises:
        ObjectNotFoundError: the object is not there, whether the server answered 404 or 403.
        AccessDeniedError: the object is there and may not be read, or it may not be listed either.
        StorageError: of any other answer.
    """
    with requests.explained(name):
        outcome = requests.outcome(act, nbytes=nbytes)
        if isinstance(outcome.error, ClientError) and _may_be_missing(outcome.error):
            _check_listed(requests, target, name, outcome.error)
            # The object is listed now: it may have been put since the denial, as a commit is.
            outcome = requests.outcome(act, nbytes=nbytes)
        return outcome.result()


def _may_be_missing(error: ClientError) -> bool:
    return status_of(error) == HTTPStatus.FORBIDDEN and is_denial(error)


def _check_listed(requests: Requests, target: Target, name: str, denied: ClientError) -> None:
    """Return if the object is there. Otherwise raise the error that the denial stands for."""
    key = f"{target.path}/{name}" if target.path else name
    listing = _listed(requests, target.bucket, key)
    error = listing.error
    if error is None:
        if not listing.result():
            raise ObjectNotFoundError("no such object") from denied
        return
    if not isinstance(error, ClientError):
        raise error
    if is_denial(error):
        raise denial(denied, target, "s3:ListBucket") from denied
    if status_of(error) in (HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED):
        raise denied
    raise error  # which says more: the answer to a HEAD has no code that would tell of a wrong clock


def _listed(requests: Requests, bucket: str, key: str) -> Outcome[bool]:
    """List the key by one request, and tell whether it is there."""

    def first(clients: Clients) -> bool:
        own = {"Bucket": bucket, "Prefix": key, "MaxKeys": 1}
        page = clients.data.list_objects_v2(**clients.arguments("list_objects_v2", **own))
        if "Name" not in page:
            raise not_s3(clients.route, page)
        return any(item.get("Key") == key for item in page.get("Contents", ()))

    return requests.outcome(first)
