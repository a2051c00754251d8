"""Values in the answers of GCS's JSON API: documents, objects, and the headers of downloads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import urllib3

from cloudckpt.backends.checksum import CRC32C
from cloudckpt.backends.errors import IntegrityError, StorageError
from cloudckpt.backends.store import ObjectInfo

FIELDS: Final = "name,size,generation,updated,crc32c"
"""Fields of an object's resource that a store asks for."""
_HINT: Final = "Use a server that speaks GCS's {} API, or check endpoint_url and STORAGE_EMULATOR_HOST"


def document(answer: urllib3.BaseHTTPResponse, endpoint: str) -> dict[str, Any]:
    """Return the JSON object that is an answer's body.

    Raises:
        StorageError: the body is something else.
    """
    return parsed(answer.data, endpoint)


def parsed(data: bytes, endpoint: str) -> dict[str, Any]:
    """Return the JSON object in ``data``.

    Raises:
        StorageError: it is something else.
    """
    try:
        found: object = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise lacking("a JSON object", endpoint)
    return found


def lacking(what: str, endpoint: str, api: str = "JSON") -> StorageError:
    """Return the error for an answer without something that answers of GCS's API have."""
    return StorageError(
        f"the endpoint {endpoint} answered without {what}: it does not support GCS's {api} API in full",
        hint=_HINT.format(api),
    )


def crc32c_of(headers: Mapping[str, str]) -> str | None:
    """Return ``crc32c:<base64>`` of the bytes that an answer is about, None where its headers have none."""
    hashes = headers.get("x-goog-hash", "").replace(" ", "").split(",")
    crc = next((one.partition("=")[2] for one in hashes if one.startswith("crc32c=")), None)
    return f"{CRC32C.name}:{crc}" if crc else None


def object_info(resource: Mapping[str, Any], prefix: str, endpoint: str) -> ObjectInfo:
    """Return an object as its resource describes it; its name is relative to ``prefix``.

    Raises:
        StorageError: the name, size or generation is missing.
    """
    for field in ("name", "size", "generation"):
        if resource.get(field) is None:
            raise lacking(f"a {field}", endpoint)
    updated, crc = resource.get("updated"), resource.get("crc32c")
    return ObjectInfo(
        resource["name"].removeprefix(prefix),
        int(resource["size"]),
        str(resource["generation"]),
        # To the second, as a download has it.
        datetime.fromisoformat(updated).replace(microsecond=0) if updated else None,
        f"{CRC32C.name}:{crc}" if crc else None,
    )


def downloaded_info(name: str, size: int, headers: Mapping[str, str]) -> ObjectInfo:
    """Return an object as the headers of its download describe it; without a version if they have none."""
    modified = headers.get("Last-Modified")
    return ObjectInfo(
        name,
        size,
        headers.get("x-goog-generation"),
        parsedate_to_datetime(modified) if modified else None,
        crc32c_of(headers),
    )


def content_length(answer: urllib3.BaseHTTPResponse, endpoint: str) -> int:
    """Return the bytes that an answer's body has.

    Raises:
        StorageError: the answer does not say.
    """
    length = answer.headers.get("Content-Length", "")
    if not length.isdecimal():
        raise lacking("a Content-Length", endpoint)
    return int(length)


def whole_size(answer: urllib3.BaseHTTPResponse, offset: int, size: int, endpoint: str) -> int | None:
    """Return the size after the slash in ``Content-Range: bytes 0-9/100``, once the range is right.

    Raises:
        IntegrityError: the object ends before the range does.
        StorageError: the answer has another range.
    """
    given, length = answer.headers.get("Content-Range"), content_length(answer, endpoint)
    if given is None:
        if offset:
            raise StorageError(f"the endpoint {endpoint} ignores ranges")
    elif not given.startswith(f"bytes {offset}-"):
        raise StorageError(f"the endpoint {endpoint} answered with another range than was asked for")
    if length < size:
        raise IntegrityError(f"the object ends at byte {offset + length}, before byte {offset + size}")
    whole = length if given is None else given.rpartition("/")[2]
    return int(whole) if str(whole).isdigit() else None
