"""Answers of status 200 that are not those of the request, and operations whose success can be checked.

A store may take such an answer for an error, or find out the truth by another request. It must never take it
for a success that is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from cloudckpt.backends.stores.base import ObjectStore, Overwrite, Part, Upload

DATA: Final = b"d" * (256 << 10)
"""Bytes of each object: what a session of GCS takes at once."""

_ANSWER: Final = "HTTP/1.1 200 OK\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n{}\r\n"


def answer(body: bytes, kind: str = "application/xml", more: str = "") -> bytes:
    """Return an answer of status 200 as bytes on the wire."""
    return _ANSWER.format(kind, len(body), more).encode() + body


def _xml(root: str, inside: str = "") -> bytes:
    return answer(f'<?xml version="1.0" encoding="UTF-8"?>\n<{root}>{inside}</{root}>'.encode())


def _json(document: object) -> bytes:
    return answer(json.dumps(document).encode(), "application/json; charset=UTF-8")


_OTHER: Final = {"name": "foreign/x", "size": "7", "generation": "1", "kind": "storage#object"}
ANSWERS: Final[Mapping[str, bytes]] = {
    "empty": answer(b""),
    "blank": answer(b" \r\n" * 100),
    "no length": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
    "a huge length": (
        b'HTTP/1.1 200 OK\r\nETag: "x"\r\nConnection: close\r\nContent-Length: 900000000000000\r\n\r\n<a/>'
    ),
    "a negative length": (
        b'HTTP/1.1 200 OK\r\nETag: "x"\r\nConnection: close\r\nContent-Length: -7\r\n\r\n<a/>'
    ),
    "a foreign document": _xml("Welcome", "<to>this proxy</to>"),
    "a document type": answer(b'<!DOCTYPE a [<!ENTITY b "c">]><ListBucketResult>&b;</ListBucketResult>'),
    "deep XML": answer(b"<a>" * 100_000),
    "half a document": answer(b"<?xml version='1.0'?><DeleteResult><Deleted>"),
    "a bucket list": _xml("ListAllMyBucketsResult", "<Buckets/>"),
    "an empty object": _json({}),
    "an empty list": _json([]),
    "no document": _json(None),
    "a number": _json(7),
    "deep JSON": answer(b"[" * 100_000, "application/json"),
    "an infinite number": answer(b'{"items": Infinity}', "application/json"),
    "text for lists": _json(
        {"kind": "storage#objects", "items": "x", "prefixes": "y", "done": True, "resource": "z"}
    ),
    "lists of numbers": _json({"kind": "storage#objects", "items": [1], "prefixes": [2], "nextPageToken": 3}),
    "lists of nothing": _json({"kind": "storage#objects", "items": None, "prefixes": None, "resource": None}),
    "foreign names": _json({"kind": "storage#objects", "items": [_OTHER], "prefixes": ["other/"], **_OTHER}),
    "a copy of another object": _json({"done": True, "resource": _OTHER}),
    "a size that is none": _json({**_OTHER, "name": "run/name", "size": "many"}),
    "a size of a thousand digits": _json({**_OTHER, "name": "run/name", "size": "9" * 5000}),
    "a size that is a list": _json({**_OTHER, "name": ["run/name"], "size": [4]}),
    "a time that is none": _json({**_OTHER, "name": "run/name", "updated": "yesterday"}),
    "a time that is a number": _json({**_OTHER, "name": "run/name", "updated": 5}),
    "a copy that goes on without a token": _json({"done": False}),
    "parts without an end": answer(b"--x\r\n\r\nHTTP/1.1 204 No", "multipart/mixed; boundary=x"),
    "parts without a boundary": answer(b"--x\r\n\r\nHTTP/1.1 204 No\r\n\r\n--x--", "multipart/mixed"),
    "parts for other requests": answer(
        b"--x\r\nContent-ID: <response-7>\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n\r\n--x--",
        "multipart/mixed; boundary=x",
    ),
    "a part for two requests": answer(
        b"--x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n\r\n--x--", "multipart/mixed; boundary=x"
    ),
    "parts of status 100": answer(
        b"--x\r\n\r\nHTTP/1.1 100 Go on\r\n\r\n\r\n" * 2 + b"--x--", "multipart/mixed; boundary=x"
    ),
    "another range": answer(DATA[:4], more='ETag: "x"\r\nContent-Range: bytes 7-10/100\r\n'),
    "a range that is none": answer(DATA[:4], more='ETag: "x"\r\nContent-Range: bytes all/many\r\n'),
    "dates that are none": answer(b"", more='ETag: "x"\r\nLast-Modified: yesterday\r\n'),
    **{
        f"an empty {root}": _xml(root)
        for root in (
            "CompleteMultipartUploadResult",
            "CopyObjectResult",
            "InitiateMultipartUploadResult",
            "DeleteResult",
            "ListBucketResult",
            "ListMultipartUploadsResult",
        )
    },
    "foreign keys": _xml(
        "ListBucketResult",
        "<Name>b</Name><IsTruncated>false</IsTruncated>"
        "<Contents><Key>other/x</Key><Size>5</Size><ETag>y</ETag></Contents>",
    ),
    "entries without a key": _xml("ListBucketResult", "<Name>b</Name><Contents/>"),
    "entries with a size that is none": _xml(
        "ListBucketResult", "<Name>b</Name><Contents><Key>run/name</Key><Size>x</Size></Contents>"
    ),
    "uploads without a key": _xml("ListMultipartUploadsResult", "<Bucket>b</Bucket><Upload/>"),
    "foreign uploads": _xml(
        "ListMultipartUploadsResult",
        "<Bucket>b</Bucket><Upload><Key>other</Key><UploadId>x</UploadId></Upload>",
    ),
    "a completion of another object": _xml(
        "CompleteMultipartUploadResult", "<Bucket>b</Bucket><Key>other</Key><ETag>x</ETag>"
    ),
    "an upload of another object": _xml(
        "InitiateMultipartUploadResult", "<Bucket>b</Bucket><Key>other</Key><UploadId>x</UploadId>"
    ),
    "a deletion of another object": _xml("DeleteResult", "<Deleted><Key>other</Key></Deleted>"),
}
"""By what is wrong with them."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A store, and a way to its bucket that is none of the store's."""

    store: ObjectStore
    source: ObjectStore
    """Another store of the bucket, which has an object ``copied``."""
    found: Callable[[str], bytes | None]
    """Returns the bytes of an object, None where there is none."""
    upload: Upload
    part: Part


Operation = Callable[[Stage], Callable[[], bool]]
"""Prepares, and returns a call that runs the operation and says whether its result is true."""


def _put(stage: Stage) -> bool:
    return stage.store.put("new", DATA, Overwrite()).size == len(DATA) and stage.found("new") == DATA


def _list(stage: Stage) -> bool:
    return [info.name for info in stage.store.list().objects] == ["name"]


def _delete(stage: Stage) -> bool:
    stage.store.delete(["name", "none"])
    return stage.found("name") is None


def _read(stage: Stage) -> bool:
    memory = bytearray(len(DATA) - 100)
    whole = stage.store.read_into("name", 100, [memoryview(memory)])
    return bytes(memory) == DATA[100:] and whole in (None, len(DATA))


def _copy(stage: Stage) -> bool:
    info = stage.store.copy_from(stage.source, stage.source.stat("copied"))
    return info is None or stage.found("copied") == DATA


def _complete(stage: Stage) -> bool:
    info = stage.store.complete_upload(stage.upload, [stage.part])
    return info.size == len(DATA) and stage.found("upload") == DATA


def _part(stage: Stage) -> bool:
    part = stage.store.upload_part(stage.upload, 1, 0, [memoryview(DATA)])
    stage.store.complete_upload(stage.upload, [part])
    return stage.found("upload") == DATA


def _begin(stage: Stage) -> bool:
    upload = stage.store.begin_upload("other")
    part = stage.store.upload_part(upload, 1, 0, [memoryview(DATA)])
    stage.store.complete_upload(upload, [part])
    return stage.found("other") == DATA


def _pending(stage: Stage) -> bool:
    return stage.upload in [one.upload for one in stage.store.pending_uploads()]


OPERATIONS: Final[Mapping[str, Callable[[Stage], bool]]] = {
    "PutObject": _put,
    "ListObjectsV2": _list,
    "DeleteObjects": _delete,
    "GetObject": lambda stage: stage.store.get("name")[0] == DATA,
    "GetRange": _read,
    "HeadObject": lambda stage: stage.store.stat("name").size == len(DATA),
    "CopyObject": _copy,
    "CreateMultipartUpload": _begin,
    "UploadPart": _part,
    "CompleteMultipartUpload": _complete,
    "ListMultipartUploads": _pending,
}
"""By the name of the request that is spoilt."""


READS: Final = ("ListObjectsV2", "GetObject", "GetRange", "HeadObject", "ListMultipartUploads")
"""Operations that change nothing."""
WELL_FORMED: Final = frozenset(
    {("PutObject", "dates that are none")}
    | {("HeadObject", kind) for kind in ("a huge length", "another range", "a range that is none")}
)
"""Answers that say nothing but what the server's own could say, by operation."""


def stage(store: ObjectStore, source: ObjectStore, found: Callable[[str], bytes | None]) -> Stage:
    """Put what the operations need, and begin an upload."""
    store.delete([info.name for info in store.list().objects])
    store.put("name", DATA, Overwrite())
    source.put("copied", DATA, Overwrite())
    upload = store.begin_upload("upload")
    return Stage(store, source, found, upload, store.upload_part(upload, 1, 0, [memoryview(DATA)]))
