"""The requests of GCS's JSON API that read objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import urllib3

from cloudckpt.backends.checksums import CRC32C
from cloudckpt.backends.errors import StorageError
from cloudckpt.backends.stores.base import Arrived, Listing, ObjectInfo
from cloudckpt.backends.stores.gcs.answers import (
    FIELDS,
    check_listing,
    content_length,
    document,
    downloaded_info,
    entries,
    lacking,
    object_info,
    whole_size,
    written_info,
)
from cloudckpt.backends.stores.gcs.client import Client
from cloudckpt.backends.stores.gcs.requests import Requests
from cloudckpt.backends.stores.http.connections import fill
from cloudckpt.backends.stores.size_limit import check_whole

_PIECE: Final = 8 << 20
_READS: Final = 5
"""Downloads of an object that changes while its generation is looked up."""


def stat(requests: Requests, name: str) -> ObjectInfo:
    """Return the size and generation of an object."""

    def ask(client: Client) -> ObjectInfo:
        answer = client.request("get", "GET", requests.path(client, name), parameters={"fields": FIELDS})
        return written_info(document(answer, client.endpoint), requests.prefix, client.endpoint, name)

    return requests.read(ask, name)


def get(requests: Requests, name: str) -> tuple[bytes, ObjectInfo]:
    """Return the bytes of an object and its generation."""

    def read(client: Client) -> tuple[bytes, ObjectInfo]:
        answer = _download(requests, client, name, {})
        data = _whole(answer, client.endpoint, lambda size: check_whole(requests.target, name, size))
        return data, downloaded_info(name, len(data), answer.headers)

    for _ in range(_READS):
        data, info = requests.read(read, name)
        if info.version is not None:
            return data, info
        # gcp-storage-emulator sends no generation with the bytes: it is looked up, and compared by CRC32C.
        info = stat(requests, name)
        if info.size == len(data) and info.checksum in (None, CRC32C.text(CRC32C.of(data))):
            return data, info
    raise lacking("a generation", requests.client.endpoint).located(uri=requests.target.uri, object_name=name)


def read_into(
    requests: Requests, name: str, offset: int, buffers: Sequence[memoryview], arrived: Arrived | None
) -> int | None:
    """Fill the buffers from an object's bytes at ``offset``, and return the object's size."""
    size = sum(buffer.nbytes for buffer in buffers)

    def read(client: Client) -> int | None:
        answer = _download(requests, client, name, {"Range": f"bytes={offset}-{offset + size - 1}"})
        if arrived is not None:
            arrived(0)
        try:
            whole = whole_size(answer, offset, size, client.endpoint)
            fill(answer, buffers, arrived)
        except BaseException:
            answer.close()  # what is left of it would be taken for the next answer
            raise
        return whole

    return requests.read(read, name) if size else None


def listed(requests: Requests, prefix: str, *, delimiter: bool) -> Listing:
    """Return the objects and common prefixes below a prefix of names."""
    whole = requests.prefix + prefix
    objects: list[ObjectInfo] = []
    prefixes: set[str] = set()
    parameters = {
        "prefix": whole,
        "fields": f"kind,items({FIELDS}),prefixes,nextPageToken",
        **({"delimiter": "/"} if delimiter else {}),
    }

    def ask(client: Client) -> tuple[dict[str, Any], list[ObjectInfo]]:
        answer = client.request("list", "GET", client.objects(requests.bucket), parameters=parameters)
        page = document(answer, client.endpoint)
        check_listing(page, client.endpoint)
        # A key that ends in a slash is the folder that a web console shows, not an object of ours.
        items = [
            item
            for item in entries(page, "items", dict, client.endpoint)
            if not str(item.get("name", "")).endswith("/")
        ]
        found = [object_info(item, requests.prefix, client.endpoint) for item in items]
        below = entries(page, "prefixes", str, client.endpoint)
        if not all(one.startswith(whole) for one in (*below, *(requests.prefix + one.name for one in found))):
            raise lacking(f"names that begin with {whole!r}", client.endpoint)
        return page, found

    seen: set[str] = set()
    while True:
        page, found = requests.ask(ask)
        objects += found
        prefixes.update(one.removeprefix(requests.prefix) for one in page.get("prefixes", ()))
        if not (token := page.get("nextPageToken")):
            break
        if token in seen:
            raise StorageError(
                "the next page of a listing begins where one before did",
                uri=requests.target.uri,
                hint="Check the option endpoint_url, and gateways and caches before the server",
            )
        seen.add(token)
        parameters["pageToken"] = token
    return Listing(tuple(sorted(objects, key=lambda info: info.name)), tuple(sorted(prefixes)))


def _whole(answer: urllib3.BaseHTTPResponse, endpoint: str, check: Callable[[int], None]) -> bytes:
    """Return the body of an answer, once its length has been checked.

    It is read in pieces: the length that it promises may be any number.
    """
    pieces: list[bytearray] = []
    try:
        if "Content-Range" in answer.headers:
            raise lacking("the whole object, and with a range of it instead", endpoint)
        size = content_length(answer, endpoint)
        check(size)
        while size:
            pieces.append(bytearray(min(size, _PIECE)))
            fill(answer, [memoryview(pieces[-1])], None)
            size -= len(pieces[-1])
    except BaseException:
        answer.close()  # what is left of it would be taken for the next answer
        raise
    answer.release_conn()
    return b"".join(pieces)


def _download(
    requests: Requests, client: Client, name: str, headers: dict[str, str]
) -> urllib3.BaseHTTPResponse:
    where = f"/download{requests.path(client, name)}"
    return client.request("get", "GET", where, parameters={"alt": "media"}, headers=headers, is_object=True)
