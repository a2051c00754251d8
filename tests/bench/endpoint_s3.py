"""The operations of S3 that the server in `bench.endpoint` serves.

It looks at no signature and at no checksum, and an ETag is a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import formatdate
from html import escape
from typing import NamedTuple
from urllib.parse import quote, unquote
from xml.etree import ElementTree as ET

from bench.endpoint_http import Answer, Request
from bench.endpoint_store import Condition, Object, Objects, Pool, Refusal

_PAGE = 1000
_NOT_SERVED = {"acl", "cors", "lifecycle", "policy", "tagging", "versioning", "versions"}
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class S3:
    """S3's operations, each a method that answers a request."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._objects = Objects()
        self._operations: Mapping[str, Callable[[Request], Answer]] = {
            "ListBuckets": self._list_buckets,
            "CreateBucket": self._create_bucket,
            "DeleteBucket": self._delete_bucket,
            "HeadBucket": self._head_bucket,
            "GetBucketLocation": self._location,
            "ListObjectsV2": self._list,
            "PutObject": self._put,
            "CopyObject": self._copy,
            "GetObject": self._get,
            "HeadObject": self._get,
            "DeleteObject": self._delete,
            "DeleteObjects": self._delete_many,
            "CreateMultipartUpload": self._begin,
            "UploadPart": self._put_part,
            "CompleteMultipartUpload": self._complete,
            "AbortMultipartUpload": self._abort,
            "ListMultipartUploads": self._list_uploads,
            "ListParts": self._list_parts,
        }

    def answer(self, request: Request) -> tuple[str, Answer]:
        """Do what is asked; return the operation's name and the answer, which may be a refusal."""
        name = _operation(request)
        try:
            if name not in self._operations:
                raise Refusal(501, "NotImplemented", f"{name} is not served here")
            answer = self._operations[name](request)
        except Refusal as refused:
            answer = _refused(request, refused)
        except (ValueError, KeyError, ET.ParseError) as malformed:
            answer = _refused(request, Refusal(400, "InvalidArgument", repr(malformed)))
        request.body.finish()
        return name, answer

    # Buckets

    def _list_buckets(self, request: Request) -> Answer:
        found = [_element("Bucket", Name=name, CreationDate=_time(0)) for name in self._objects.buckets()]
        return Answer.xml(_document("ListAllMyBucketsResult", f"<Buckets>{''.join(found)}</Buckets>"))

    def _create_bucket(self, request: Request) -> Answer:
        self._objects.create_bucket(request.bucket)
        return Answer(headers={"Location": f"/{request.bucket}"})

    def _delete_bucket(self, request: Request) -> Answer:
        self._objects.delete_bucket(request.bucket)
        return Answer(204)

    def _head_bucket(self, request: Request) -> Answer:
        self._objects.check_bucket(request.bucket)
        return Answer(headers={"x-amz-bucket-region": "us-east-1"})

    def _location(self, request: Request) -> Answer:
        self._objects.check_bucket(request.bucket)
        return Answer.xml(_document("LocationConstraint"))

    def _list(self, request: Request) -> Answer:
        query = request.query
        most = min(int(query.get("max-keys", _PAGE)), _PAGE)
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = max(unquote(query.get("continuation-token", "")), query.get("start-after", ""))
        page = self._objects.list(request.bucket, prefix, delimiter, after, most)
        shown = _shown_names(request)
        lines = [
            _elements(
                Name=request.bucket,
                Prefix=shown(prefix),
                Delimiter=shown(delimiter) or None,
                MaxKeys=most,
                EncodingType=query.get("encoding-type"),
                KeyCount=len(page.objects) + len(page.prefixes),
                IsTruncated=str(page.last is not None).lower(),
                NextContinuationToken=None if page.last is None else quote(page.last, safe=""),
            )
        ]
        lines += [
            _element(
                "Contents",
                Key=shown(key),
                LastModified=_time(found.modified),
                ETag=found.etag,
                Size=found.size,
                StorageClass="STANDARD",
            )
            for key, found in page.objects
        ]
        lines += [_element("CommonPrefixes", Prefix=shown(name)) for name in page.prefixes]
        return Answer.xml(_document("ListBucketResult", *lines))

    # Objects

    def _put(self, request: Request) -> Answer:
        block = self._pool.block(request.body.size)
        request.body.receive(block)
        condition = _condition(request)
        made = self._objects.put(request.bucket, request.key, [block], _kept_headers(request), condition)
        return Answer(headers={"ETag": made.etag})

    def _copy(self, request: Request) -> Answer:
        source = unquote(request.headers["x-amz-copy-source"]).removeprefix("/")
        bucket, _, key = source.partition("/")
        found = self._objects.get(bucket, key)
        condition = _condition(request)
        made = self._objects.put(request.bucket, request.key, found.blocks, found.headers, condition)
        facts = _elements(ETag=made.etag, LastModified=_time(made.modified))
        return Answer.xml(_document("CopyObjectResult", facts))

    def _get(self, request: Request) -> Answer:
        found = self._objects.get(request.bucket, request.key)
        wanted, known = request.headers.get("if-match"), request.headers.get("if-none-match")
        if wanted is not None and wanted.strip('"') not in ("*", found.etag.strip('"')):
            raise Refusal(412, "PreconditionFailed")
        headers = {
            "ETag": found.etag,
            "Last-Modified": formatdate(found.modified, usegmt=True),
            "Accept-Ranges": "bytes",
            **found.headers,
        }
        if known is not None and known.strip('"') in ("*", found.etag.strip('"')):
            return Answer(304, headers)
        size = found.size
        asked = _range(request, found, size)
        start, stop = asked or (0, size)
        if asked is not None:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        if found.parts and "partNumber" in request.query:
            headers["x-amz-mp-parts-count"] = str(len(found.blocks))
        views = found.views(start, stop)
        return Answer(200 if asked is None else 206, headers, stop - start, views, found)

    def _delete(self, request: Request) -> Answer:
        self._objects.delete(request.bucket, [request.key])
        return Answer(204)

    def _delete_many(self, request: Request) -> Answer:
        asked = ET.fromstring(request.body.read())  # noqa: S314 - from our own clients
        keys = [found.text or "" for found in asked.iterfind("{*}Object/{*}Key")]
        self._objects.delete(request.bucket, keys)
        quiet = asked.findtext("{*}Quiet") == "true"
        return Answer.xml(
            _document("DeleteResult", *(_element("Deleted", Key=key) for key in keys if not quiet))
        )

    # Uploads

    def _begin(self, request: Request) -> Answer:
        upload = self._objects.begin(request.bucket, request.key, _kept_headers(request))
        facts = _elements(Bucket=request.bucket, Key=request.key, UploadId=upload.upload_id)
        return Answer.xml(_document("InitiateMultipartUploadResult", facts))

    def _put_part(self, request: Request) -> Answer:
        number, upload = int(request.query["partNumber"]), request.query["uploadId"]
        block = self._pool.block(request.body.size)
        request.body.receive(block)
        part = self._objects.put_part(request.bucket, request.key, upload, number, block)
        return Answer(headers={"ETag": part.etag})

    def _complete(self, request: Request) -> Answer:
        asked = ET.fromstring(request.body.read())  # noqa: S314 - from our own clients
        named = [
            (int(part.findtext("{*}PartNumber", "")), part.findtext("{*}ETag", ""))
            for part in asked.iterfind("{*}Part")
        ]
        upload, condition = request.query["uploadId"], _condition(request)
        made = self._objects.complete(request.bucket, request.key, upload, named, condition)
        location = quote(f"/{request.bucket}/{request.key}")
        facts = _elements(Location=location, Bucket=request.bucket, Key=request.key, ETag=made.etag)
        return Answer.xml(_document("CompleteMultipartUploadResult", facts))

    def _abort(self, request: Request) -> Answer:
        self._objects.abort(request.bucket, request.key, request.query["uploadId"])
        return Answer(204)

    def _list_uploads(self, request: Request) -> Answer:
        query = request.query
        most = min(int(query.get("max-uploads", _PAGE)), _PAGE)
        after = (query.get("key-marker", ""), query.get("upload-id-marker", ""))
        found = [
            upload
            for upload in self._objects.uploads(request.bucket, query.get("prefix", ""))
            if (upload.key, upload.upload_id) > after and (after[1] or upload.key != after[0])
        ]
        page, more = found[:most], len(found) > most
        shown = _shown_names(request)
        lines = [
            _elements(
                Bucket=request.bucket,
                Prefix=shown(query.get("prefix", "")),
                MaxUploads=most,
                EncodingType=query.get("encoding-type"),
                IsTruncated=str(more).lower(),
                NextKeyMarker=shown(page[-1].key) if more else None,
                NextUploadIdMarker=page[-1].upload_id if more else None,
            )
        ]
        lines += [
            _element(
                "Upload", Key=shown(upload.key), UploadId=upload.upload_id, Initiated=_time(upload.started)
            )
            for upload in page
        ]
        return Answer.xml(_document("ListMultipartUploadsResult", *lines))

    def _list_parts(self, request: Request) -> Answer:
        query = request.query
        most = min(int(query.get("max-parts", _PAGE)), _PAGE)
        found = [
            (number, part)
            for number, part in self._objects.parts(request.bucket, request.key, query["uploadId"])
            if number > int(query.get("part-number-marker", 0))
        ]
        page, more = found[:most], len(found) > most
        lines = [
            _elements(
                Bucket=request.bucket,
                Key=request.key,
                UploadId=query["uploadId"],
                MaxParts=most,
                IsTruncated=str(more).lower(),
                NextPartNumberMarker=page[-1][0] if more else None,
            )
        ]
        lines += [
            _element("Part", PartNumber=number, ETag=part.etag, Size=part.block.size) for number, part in page
        ]
        return Answer.xml(_document("ListPartsResult", *lines))


class _Case(NamedTuple):
    method: str
    level: int
    """Of a path: 0 the root, 1 a bucket, 2 an object."""
    query: str
    """A key that the query must have."""
    operation: str


_CASES = (
    _Case("GET", 0, "", "ListBuckets"),
    _Case("PUT", 1, "", "CreateBucket"),
    _Case("DELETE", 1, "", "DeleteBucket"),
    _Case("HEAD", 1, "", "HeadBucket"),
    _Case("GET", 1, "location", "GetBucketLocation"),
    _Case("GET", 1, "uploads", "ListMultipartUploads"),
    _Case("GET", 1, "", "ListObjectsV2"),
    _Case("POST", 1, "delete", "DeleteObjects"),
    _Case("PUT", 2, "uploadId", "UploadPart"),
    _Case("PUT", 2, "", "PutObject"),
    _Case("GET", 2, "uploadId", "ListParts"),
    _Case("GET", 2, "", "GetObject"),
    _Case("HEAD", 2, "", "HeadObject"),
    _Case("DELETE", 2, "uploadId", "AbortMultipartUpload"),
    _Case("DELETE", 2, "", "DeleteObject"),
    _Case("POST", 2, "uploads", "CreateMultipartUpload"),
    _Case("POST", 2, "uploadId", "CompleteMultipartUpload"),
)


def _operation(request: Request) -> str:
    level = 2 if request.key else 1 if request.bucket else 0
    asked = (request.method, level)
    found = next(
        (
            case.operation
            for case in _CASES
            if (case.method, case.level) == asked and (not case.query or case.query in request.query)
        ),
        f"{request.method} on level {level}",
    )
    if unknown := _NOT_SERVED & request.query.keys():
        return f"{request.method} {min(unknown)}"
    if "x-amz-copy-source" in request.headers:
        return {"PutObject": "CopyObject", "UploadPart": "UploadPartCopy"}.get(found, found)
    return found


def _condition(request: Request) -> Condition:
    return Condition(request.headers.get("if-none-match"), request.headers.get("if-match"))


def _kept_headers(request: Request) -> Mapping[str, str]:
    return {
        name: value
        for name, value in request.headers.items()
        if name == "content-type" or name.startswith("x-amz-meta-")
    }


def _range(request: Request, found: Object, size: int) -> tuple[int, int] | None:
    """Return the first byte asked for and the one behind the last; None where all are."""
    if "partNumber" in request.query:
        number = int(request.query["partNumber"])
        if not 1 <= number <= len(found.blocks):
            raise Refusal(416, "InvalidPartNumber")
        start = sum(block.size for block in found.blocks[: number - 1])
        return (start, start + found.blocks[number - 1].size) if size else None
    matched = _RANGE.fullmatch(request.headers.get("range", ""))
    if matched is None or matched[0] == "bytes=-":
        return None
    first, last = matched.groups()
    if not first:
        start, stop = max(size - int(last), 0), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size:
        raise Refusal(416, "InvalidRange", size=size)
    return start, stop


def _refused(request: Request, refused: Refusal) -> Answer:
    resource = f"/{request.bucket}/{request.key}"
    # The size is in the document too: there AWS' own client looks for it, to tell an empty object.
    facts = _elements(
        Code=refused.code, Message=str(refused), Resource=resource, ActualObjectSize=refused.size
    )
    headers = {} if refused.size is None else {"Content-Range": f"bytes */{refused.size}"}
    return Answer.xml(f"<Error>{facts}</Error>", refused.status, headers)


def _shown_names(request: Request) -> Callable[[str], str]:
    return quote if request.query.get("encoding-type") == "url" else str


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _document(root: str, *content: str) -> str:
    return f'<{root} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{"".join(content)}</{root}>'


def _element(name: str, **children: object) -> str:
    return f"<{name}>{_elements(**children)}</{name}>"


def _elements(**children: object) -> str:
    """Return an element for each value that there is."""
    return "".join(
        f"<{name}>{escape(str(value))}</{name}>" for name, value in children.items() if value is not None
    )
