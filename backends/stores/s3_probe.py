"""Which write conditions an S3 server honours, found out by trying, since some take and ignore them."""

from __future__ import annotations

import os
import threading
import uuid
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from botocore.exceptions import ClientError

from cloudckpt.backends.stores.retry import Outcome
from cloudckpt.backends.stores.s3_client import Clients
from cloudckpt.backends.stores.s3_errors import is_of_credentials, status_of
from cloudckpt.backends.stores.s3_requests import Requests

PROBE_NAME: Final = ".cloudckpt-probe."
"""How the name of a probe object begins."""

_REFUSED: Final = (HTTPStatus.BAD_REQUEST, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)


@dataclass(frozen=True, slots=True)
class Honoured:
    """What a server does with the conditions of a put."""

    create: bool
    update: bool


_known: dict[tuple[int, str, str], Honoured] = {}
_lock = threading.Lock()


def conditions_honoured(requests: Requests, bucket: str, prefix: str) -> Honoured:
    """Return what the server honours. S3 itself is not asked; any other server once a process and bucket.

    The probe puts an empty hidden object below ``prefix`` up to three times and deletes it.
    """
    clients = requests.clients
    if clients.is_aws:
        return Honoured(create=True, update=True)
    place = (os.getpid(), clients.endpoint, bucket)
    with _lock:
        if place not in _known:
            _known[place] = _probe(requests, bucket, f"{prefix}{PROBE_NAME}{uuid.uuid4().hex}")
        return _known[place]


def _probe(requests: Requests, bucket: str, key: str) -> Honoured:
    def delete(clients: Clients) -> None:
        clients.data.delete_object(**clients.arguments("delete_object", Bucket=bucket, Key=key))

    _put(requests, bucket, key).result()
    try:
        return Honoured(
            create=_is_held_to(requests, bucket, key, IfNoneMatch="*"),
            update=_is_held_to(requests, bucket, key, IfMatch='"00000000000000000000000000000000"'),
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
    error = _put(requests, bucket, key, **condition).error
    if error is None:
        return False
    if not isinstance(error, ClientError) or is_of_credentials(error):
        raise error
    if status_of(error) == HTTPStatus.PRECONDITION_FAILED:
        return True
    if status_of(error) not in _REFUSED:
        raise error
    return False
