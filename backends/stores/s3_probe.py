"""What an S3 server honours of a put, found out by trying: some take conditions and never look at them."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from botocore.exceptions import ClientError

from cloudckpt.backends.stores.names import probe_name
from cloudckpt.backends.stores.retry import Outcome
from cloudckpt.backends.stores.s3_client import Clients
from cloudckpt.backends.stores.s3_errors import is_of_credentials, status_of
from cloudckpt.backends.stores.s3_requests import Requests

_WRONG_CHECKSUM: Final = "/////////w8="
"""That of no bytes is zero."""
_REFUSED: Final = (HTTPStatus.BAD_REQUEST, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)


@dataclass(frozen=True, slots=True)
class Honoured:
    """What a server takes notice of."""

    create: bool
    """The condition that nothing is there."""
    update: bool
    """The condition that a certain version is there."""
    checksum: bool
    """A checksum that goes before the bytes."""


_known: dict[tuple[int, str, str], Honoured] = {}
_lock = threading.Lock()


def what_is_honoured(requests: Requests, bucket: str, prefix: str) -> Honoured:
    """Return what the server honours. S3 itself is not asked; any other server once a process and bucket.

    The probe puts an empty hidden object below ``prefix`` up to four times and deletes it.
    """
    clients = requests.clients
    if clients.is_aws:
        return Honoured(create=True, update=True, checksum=True)
    place = (os.getpid(), clients.endpoint, bucket)
    with _lock:
        if place not in _known:
            _known[place] = _probe(requests, bucket, f"{prefix}{probe_name()}")
        return _known[place]


def _probe(requests: Requests, bucket: str, key: str) -> Honoured:
    def delete(clients: Clients) -> None:
        clients.data.delete_object(**clients.arguments("delete_object", Bucket=bucket, Key=key))

    _put(requests, bucket, key).result()
    try:
        return Honoured(
            create=_is_held_to(requests, bucket, key, IfNoneMatch="*"),
            update=_is_held_to(requests, bucket, key, IfMatch='"00000000000000000000000000000000"'),
            checksum=_is_checked(requests, bucket, key),
        )
    finally:
        requests.outcome(delete).result()


def _put(requests: Requests, bucket: str, key: str, **condition: str) -> Outcome[None]:
    def put(clients: Clients) -> None:
        own = {"Bucket": bucket, "Key": key, "Body": b"", **condition}
        clients.data.put_object(**clients.arguments("put_object", **own))

    return requests.outcome(put)


def _is_held_to(requests: Requests, bucket: str, key: str, **condition: str) -> bool:
    """Tell whether a put is refused for a condition that does not hold."""
    refused = _refusal(_put(requests, bucket, key, **condition), HTTPStatus.PRECONDITION_FAILED)
    return refused == HTTPStatus.PRECONDITION_FAILED


def _is_checked(requests: Requests, bucket: str, key: str) -> bool:
    """Tell whether a put is refused for a checksum that is wrong."""
    refused = _refusal(_put(requests, bucket, key, ChecksumCRC64NVME=_WRONG_CHECKSUM))
    return refused == HTTPStatus.BAD_REQUEST


def _refusal(outcome: Outcome[None], *more: HTTPStatus) -> int | None:
    """Return the status with which a put was refused, None where it was not; any other failure is one."""
    error = outcome.error
    if error is None:
        return None
    if not isinstance(error, ClientError) or is_of_credentials(error):
        raise error
    if status_of(error) not in (*_REFUSED, *more):
        raise error
    return status_of(error)
