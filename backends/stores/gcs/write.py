"""The requests of GCS's JSON API that write or delete one object: one attempt each, without retries."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from cloudckpt.backends.checksums import CRC32C
from cloudckpt.backends.stores.base import ObjectInfo
from cloudckpt.backends.stores.gcs.answers import FIELDS, document, lacking, written_info
from cloudckpt.backends.stores.gcs.client import Client
from cloudckpt.backends.stores.gcs.endpoint import elsewhere, is_of
from cloudckpt.backends.stores.gcs.requests import Requests
from cloudckpt.backends.stores.http.request_body import BuffersBody

_NOTHING: Final = (b"", b"null", b"{}")
"""Bodies of the answer to a deletion. Google's is the first, those of emulators are the others."""


def insert(
    requests: Requests, client: Client, name: str, data: bytes, conditions: Mapping[str, str]
) -> ObjectInfo:
    """Put an object in one request, with its CRC32C.

    Raises:
        RefusedError: the server answered with an error.
        StorageError: the answer lacks the object's generation.
    """
    parameters = {"uploadType": "multipart", "fields": FIELDS, **requests.writing, **conditions}
    resource = {**requests.resource(name), "crc32c": CRC32C.text(CRC32C.of(data)).partition(":")[2]}
    border = os.urandom(16).hex()
    head = (
        f"--{border}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(resource)}\r\n"
        f"--{border}\r\nContent-Type: application/octet-stream\r\n\r\n"
    ).encode()
    pieces = [memoryview(piece) for piece in (head, data, f"\r\n--{border}--\r\n".encode())]
    answer = client.request(
        "put",
        "POST",
        f"/upload{client.objects(requests.bucket)}",
        parameters=parameters,
        headers={"Content-Type": f"multipart/related; boundary={border}"},
        body=BuffersBody(pieces),
    )
    resource = document(answer, client.endpoint)
    return written_info(resource, requests.prefix, client.endpoint, name, len(data))


def begin_session(requests: Requests, client: Client, name: str) -> str:
    """Begin a resumable session for an object and return its URL.

    Raises:
        RefusedError: the server answered with an error.
        StorageError: the answer has no URL.
    """
    answer = client.request(
        "begin an upload",
        "POST",
        f"/upload{client.objects(requests.bucket)}",
        parameters={"uploadType": "resumable", **requests.writing},
        headers={
            "Content-Type": "application/json; charset=UTF-8",
            "X-Upload-Content-Type": "application/octet-stream",
        },
        body=json.dumps(requests.resource(name)).encode(),
    )
    answer.drain_conn()
    answer.release_conn()
    url = answer.headers.get("Location", "")
    if not url.startswith(("http://", "https://")):
        raise lacking("the URL of an upload", client.endpoint)
    if not is_of(url, client.endpoint):
        raise elsewhere(url, client.endpoint)
    return url


def delete(requests: Requests, client: Client, name: str, generation: str | None = None) -> None:
    """Delete an object, or that generation of it. One that is not there is no error.

    Raises:
        RefusedError: the server answered with another error.
    """
    fine = (int(HTTPStatus.NOT_FOUND), *((int(HTTPStatus.PRECONDITION_FAILED),) if generation else ()))
    parameters = {"ifGenerationMatch": generation} if generation else {}
    answer = client.request("delete", "DELETE", requests.path(client, name), parameters=parameters, fine=fine)
    if answer.data.strip() not in _NOTHING and answer.status not in fine:
        raise lacking("nothing else than that it deleted", client.endpoint)
