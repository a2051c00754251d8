"""Listing an S3 bucket: its objects, and its uploads that are neither completed nor aborted."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

from botocore.exceptions import ClientError

from cloudckpt.backends.errors import StorageError, UnsupportedError
from cloudckpt.backends.stores.base import Listing, ObjectInfo, PendingUpload, Upload
from cloudckpt.backends.stores.s3.client import Clients
from cloudckpt.backends.stores.s3.errors import is_page, not_s3, status_of
from cloudckpt.backends.stores.s3.requests import Requests

_UNSUPPORTED = (HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)
_OBJECT_TOKENS = {"ContinuationToken": "NextContinuationToken"}
_UPLOAD_TOKENS = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}


def listed_objects(
    requests: Requests, bucket: str, prefix: str, below: str, *, delimiter: bool = False
) -> Listing:
    """Return the objects whose names begin with ``below``; names are without ``prefix``."""
    objects: list[ObjectInfo] = []
    prefixes: list[str] = []
    arguments: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix + below}
    if delimiter:
        arguments["Delimiter"] = "/"
    whole = prefix + below
    for page in _pages(requests, "list_objects_v2", arguments, _OBJECT_TOKENS):
        for item in page.get("Contents", ()):
            name = _key_of(requests, "Key", item, whole).removeprefix(prefix)
            if "Size" not in item:
                raise _foreign(requests, "an object without a size")
            # A key that ends in a slash is the folder that a web console shows, not an object of ours.
            if name and not name.endswith("/"):
                tag = str(item.get("ETag", "")).strip('"') or None
                objects.append(ObjectInfo(name, item["Size"], tag, item.get("LastModified")))
        prefixes += [
            _key_of(requests, "Prefix", item, whole).removeprefix(prefix)
            for item in page.get("CommonPrefixes", ())
        ]
    return Listing(tuple(sorted(objects, key=lambda info: info.name)), tuple(sorted(prefixes)))


def listed_uploads(requests: Requests, bucket: str, prefix: str, below: str) -> Iterator[PendingUpload]:
    """Yield the uploads whose names begin with ``below``; names are without ``prefix``.

    Raises:
        UnsupportedError: the server has no ListMultipartUploads.
    """
    arguments = {"Bucket": bucket, "Prefix": prefix + below}
    for page in _pages(requests, "list_multipart_uploads", arguments, _UPLOAD_TOKENS):
        for item in page.get("Uploads", ()):
            if not item.get("UploadId"):
                raise _foreign(requests, "an upload without an ID")
            upload = Upload(
                _key_of(requests, "Key", item, prefix + below).removeprefix(prefix), item["UploadId"]
            )
            yield PendingUpload(upload, item.get("Initiated"))


def check_supported(error: Exception | None) -> None:
    """Check an error of a request for the answer of a server that has no such request.

    Raises:
        UnsupportedError: it is one.
    """
    if not isinstance(error, ClientError):
        return
    # A web server answers 405 as well, where only a server of S3 would say so in S3's own form.
    is_s3 = status_of(error) == HTTPStatus.NOT_IMPLEMENTED or not is_page(error.response)
    if is_s3 and status_of(error) in _UNSUPPORTED:
        what = f"the server does not support {error.operation_name} ({status_of(error)})"
        raise UnsupportedError(what) from error


def _key_of(requests: Requests, field: str, item: Mapping[str, Any], prefix: str) -> str:
    """Return the key of an entry of a listing of the keys that begin with ``prefix``."""
    key = str(item.get(field, ""))
    if not key.startswith(prefix):
        raise _foreign(requests, f"keys that do not begin with {prefix!r}")
    return key


def _foreign(requests: Requests, what: str) -> StorageError:
    route = requests.clients.route
    with requests.explained():
        raise not_s3(route, what=f"the listing has {what}")


def _pages(
    requests: Requests, method: str, arguments: Mapping[str, Any], tokens: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Yield the pages of a listing, where ``tokens`` says which fields of a page ask for the next."""
    following: dict[str, str] = {}
    seen: set[int] = set()
    while True:
        with requests.explained():
            outcome = requests.outcome(functools.partial(_page, method, {**arguments, **following}))
            check_supported(outcome.error)
            page = outcome.result()
        yield page
        following = {token: page[field] for token, field in tokens.items() if page.get(field)}
        if not page.get("IsTruncated"):
            return
        mark = hash(frozenset(following.items()))
        if not following or mark in seen:
            with requests.explained():
                raise StorageError(
                    f"{method}: the server's next page begins where one before did, or nowhere",
                    hint="Check the option endpoint_url, and gateways and caches before the server",
                )
        seen.add(mark)


def _page(method: str, arguments: Mapping[str, Any], clients: Clients) -> dict[str, Any]:
    page: dict[str, Any] = getattr(clients.data, method)(**clients.arguments(method, **arguments))
    if "Name" not in page and "Bucket" not in page:
        raise not_s3(clients.route, page)
    return page
