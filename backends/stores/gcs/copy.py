"""Copies that GCS makes itself: by a rewrite, in as many calls as GCS wants for an object of this size."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

from cloudckpt.backends.errors import AccessDeniedError, ObjectNotFoundError, PreconditionFailedError
from cloudckpt.backends.stores.base import ObjectInfo
from cloudckpt.backends.stores.gcs.answers import FIELDS, document, lacking, written_info
from cloudckpt.backends.stores.gcs.capabilities import server_of
from cloudckpt.backends.stores.gcs.client import Client
from cloudckpt.backends.stores.gcs.errors import explained, status_of
from cloudckpt.backends.stores.gcs.read import stat
from cloudckpt.backends.stores.gcs.requests import Requests
from cloudckpt.backends.stores.gcs.write import delete

_NO_REWRITE: Final = (HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)


def copied(requests: Requests, original: Requests, info: ObjectInfo) -> ObjectInfo | None:
    """Have GCS copy the object of ``original`` that has ``info``, to the same name.

    A server that ignores ``ifSourceGenerationMatch`` copies the generation that is there. On such a server
    the generation of the original is compared before the copy and after it, and a copy that may be of
    another is deleted.

    Returns:
        The copy, or None where the original is another generation by now, or the server can't copy it.
    """
    if not requests.target.options.reaches_as(original.target.options):
        return None
    with explained(requests.target, requests.client.route, info.name):
        is_conditional = server_of(requests).copy_source(requests)
    try:
        if not is_conditional and not _is_unchanged(original, info):
            return None
        copy = _rewritten(requests, original, info)
    except (AccessDeniedError, ObjectNotFoundError, PreconditionFailedError):
        return None
    if copy is None or is_conditional or _is_unchanged(original, info):
        return copy
    requests.ask(lambda client: delete(requests, client, copy.name, copy.version), copy.name)
    return None


def _rewritten(requests: Requests, original: Requests, info: ObjectInfo) -> ObjectInfo | None:
    """Return the copy, None where the server has no such request."""
    options = requests.target.options
    key = quote(original.prefix + info.name, safe="")
    there = f"rewriteTo/b/{quote(requests.bucket, safe='')}/o/{quote(requests.prefix + info.name, safe='')}"
    # Without a resource the original's is kept.
    storage_class, kms_key = options.storage_class, options.kms_key_name
    resource = json.dumps({"storageClass": storage_class}).encode() if storage_class else b""
    parameters = {
        "fields": f"done,rewriteToken,resource({FIELDS})",
        **({"ifSourceGenerationMatch": info.version} if info.version else {}),
        **({"destinationKmsKeyName": kms_key} if kms_key else {}),
    }

    def rewrite(client: Client) -> dict[str, Any]:
        where = f"{client.objects(original.bucket)}/{key}/{there}"
        headers = {"Content-Type": "application/json; charset=UTF-8"}
        answer = client.request("copy", "POST", where, parameters=parameters, headers=headers, body=resource)
        rewrite = document(answer, client.endpoint)
        if not rewrite.get("done") and not isinstance(rewrite.get("rewriteToken"), str):
            raise lacking("a rewriteToken", client.endpoint)
        if rewrite.get("done") and not isinstance(rewrite.get("resource"), dict):
            raise lacking("the resource of a copy", client.endpoint)
        return rewrite

    endpoint = requests.client.endpoint
    with explained(requests.target, requests.client.route, info.name):
        while True:
            outcome = requests.outcome(rewrite)
            if status_of(outcome.error) in _NO_REWRITE:
                return None
            answer = outcome.result()
            if answer.get("done"):
                break
            parameters["rewriteToken"] = answer["rewriteToken"]
        return written_info(answer["resource"], requests.prefix, endpoint, info.name)


def _is_unchanged(original: Requests, info: ObjectInfo) -> bool:
    """Return True if the object still has the generation of ``info``."""
    try:
        return stat(original, info.name).version == info.version
    except ObjectNotFoundError:
        return False
