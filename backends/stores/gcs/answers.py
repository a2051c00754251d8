"""Values in the answers of GCS's JSON API: documents, objects, and the headers of downloads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar

import urllib3

from cloudckpt.backends.checksums import CRC32C
from cloudckpt.backends.errors import StorageError
from cloudckpt.backends.stores.base import ObjectInfo
from cloudckpt.backends.stores.http import content_range

_T = TypeVar("_T")

_DIGITS: Final = 19
"""Of the largest number of bytes."""
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
    except (ValueError, RecursionError):  # of lists within lists
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
    name, generation = resource["name"], str(resource["generation"])
    if not isinstance(name, str) or not name.startswith(prefix):
        raise lacking(f"a name that begins with {prefix!r}", endpoint)
    if not generation.isdecimal():
        raise lacking("a generation that is a number", endpoint)
    updated, crc = resource.get("updated"), resource.get("crc32c")
    return ObjectInfo(
        name.removeprefix(prefix),
        size_of(resource["size"], endpoint),
        generation,
        # To the second, as a download has it.
        _time_of(updated, endpoint).replace(microsecond=0) if updated else None,
        f"{CRC32C.name}:{crc}" if crc else None,
    )


def written_info(
    resource: Mapping[str, Any], prefix: str, endpoint: str, name: str, size: int | None = None
) -> ObjectInfo:
    """Return an object that was just written, as its resource describes it.

    Raises:
        StorageError: it is another object, or has another size.
    """
    info = object_info(resource, prefix, endpoint)
    if info.name != name:
        raise lacking(f"the object {name!r}, about {info.name[:200]!r} instead", endpoint)
    if size is not None and info.size != size:
        raise lacking(f"the size {size:,} that was sent, and with {info.size:,} instead", endpoint)
    return info


def size_of(value: object, endpoint: str) -> int:
    """Return a number of bytes, which the JSON API has as text.

    Raises:
        StorageError: it is none.
    """
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal() or len(text) > _DIGITS:
        raise lacking("a size that is a number", endpoint)
    return int(text)


def entries(page: Mapping[str, Any], field: str, kind: type[_T], endpoint: str) -> list[_T]:
    """Return the entries of a page's list, empty where it has none.

    Raises:
        StorageError: the field is no list of this kind.
    """
    found: object = page.get(field, [])
    if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
        raise lacking(f"a list of {field}", endpoint)
    return found


def check_listing(page: Mapping[str, Any], endpoint: str) -> None:
    """Check that a document is a page of a listing. An empty page has no other field than its kind.

    Raises:
        StorageError: it is something else.
    """
    if page.get("kind") != "storage#objects":
        raise lacking("the kind of a listing", endpoint)
    token = page.get("nextPageToken", "")
    if not isinstance(token, str):
        raise lacking("a token that is text", endpoint)


def _time_of(value: object, endpoint: str) -> datetime:
    try:
        return datetime.fromisoformat(value if isinstance(value, str) else "")
    except ValueError:
        raise lacking("a time that can be read", endpoint) from None


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
    if not length.isdecimal() or len(length) > _DIGITS:
        raise lacking("a Content-Length", endpoint)
    return int(length)


def whole_size(answer: urllib3.BaseHTTPResponse, offset: int, size: int, endpoint: str) -> int | None:
    """Return the size of the whole object, once the answer is found to have the range.

    Raises:
        IntegrityError: the object ends before the range does.
        StorageError: the answer has another range.
    """
    return content_range.whole_size(
        status=answer.status,
        given=answer.headers.get("Content-Range"),
        length=content_length(answer, endpoint),
        offset=offset,
        size=size,
        server=endpoint,
    )
