"""The XML API of the tests' Google Cloud Storage: multipart uploads, and objects without conditions, at
`/BUCKET/OBJECT`."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from urllib.parse import quote, unquote
from xml.sax.saxutils import escape

from support.gcs_objects import Conditions, Content, Json, Refusal
from support.gcs_permissions import Permissions
from support.gcs_state import Cloud
from support.gcs_uploads import MultipartUpload, MultipartUploads
from support.gcs_wire import Answer, Request, media, sums

_OTHER_APIS = frozenset({"storage", "upload", "download", "batch", "_gcs", ""})
_CODES: Mapping[tuple[int, str], str] = {
    (400, "invalid"): "InvalidArgument",
    (401, "authError"): "AuthenticationRequired",
    (403, "forbidden"): "AccessDenied",
    (404, "notFound"): "NoSuchBucket",
    (429, "rateLimitExceeded"): "SlowDown",
    (500, "backendError"): "InternalError",
    (503, "backendError"): "ServiceUnavailable",
}
"""Codes for what the JSON API gives a status and a reason."""
_KEY = re.compile(r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+")
_NUMBER = re.compile(r"[0-9]{1,9}")
_MOST_LISTED = "1000"
_CREATE = ("storage.multipartUploads.create", "storage.objects.create")
_DECLARATION = "<?xml version='1.0' encoding='UTF-8'?>"
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_HEADERS: Mapping[str, str] = {"X-GUploader-UploadID": "tests"}


def is_xml(request: Request) -> bool:
    """Return True for a request of the XML API."""
    return request.segments[0] not in _OTHER_APIS


def refused_in_xml(refusal: Refusal, headers: Mapping[str, str] | None = None) -> Answer:
    """Return Google's XML for an error."""
    code = _CODES.get((refusal.status, refusal.reason), refusal.reason)
    page = f"{_DECLARATION}<Error>{_elements(Code=code, Message=refusal.message)}</Error>"
    return _document(page, headers or {}, refusal.status)


class XmlApi:
    """Requests of the XML API, and what they do."""

    def __init__(self, cloud: Cloud, uploads: MultipartUploads, permissions: Permissions) -> None:
        self._cloud = cloud
        self._uploads = uploads
        self._permissions = permissions

    def answer(self, request: Request) -> Answer:
        """Answer a request.

        Raises:
            Refusal: as of the JSON API, or with a code of the XML API for a reason.
        """
        bucket, name = request.segments[0], "/".join(request.segments[1:])
        self._charge(request, bucket)
        query = request.query
        if not name and request.method == "GET" and "uploads" in query:
            return self._list(bucket, query)
        if not name and request.method == "GET" and query.get("list-type") == "2":
            return self._list_objects(bucket, query)
        if name and request.method == "POST" and "uploads" in query:
            return self._begin(request, bucket, name)
        answer = None
        if name and "uploadId" in query:
            answer = self._answer_of_upload(request, bucket, name)
        elif name and not query:
            answer = self._answer_of_object(request, bucket, name)
        if answer is None:
            message = "The specified method is not allowed against this resource."
            raise Refusal(405, "MethodNotAllowed", message)
        return answer

    def _answer_of_upload(self, request: Request, bucket: str, name: str) -> Answer | None:
        match request.method:
            case "PUT" if "partNumber" in request.query:
                return self._put(request, bucket, name)
            case "POST":
                return self._complete(request, bucket, name)
            case "DELETE":
                self._require(bucket, "storage.multipartUploads.abort")
                self._uploads.abort(bucket, name, request.query["uploadId"])
                return Answer(204, _HEADERS)
            case _:
                return None

    def _answer_of_object(self, request: Request, bucket: str, name: str) -> Answer | None:
        match request.method:
            case "GET" | "HEAD":
                self._require(bucket, "storage.objects.get")
                return media(self._cloud.get(bucket, name, Conditions()), request.headers.get("Range"))
            case "PUT" if copied := request.headers.get("x-goog-copy-source"):
                return self._copy_object(copied, bucket, name)
            case "PUT" if not any(header.lower().startswith("x-goog-") for header in request.headers):
                return self._put_object(request, bucket, name)
            case "DELETE":
                self._require(bucket, "storage.objects.delete")
                self._cloud.delete(bucket, name, Conditions())
                return Answer(204, _HEADERS)
            case _:
                return None

    def _charge(self, request: Request, bucket: str) -> None:
        payer = request.headers.get("x-goog-user-project") or request.query.get("userProject")
        if self._cloud.bucket(bucket).requester_pays and not payer:
            message = "Bucket is a requester pays bucket but no user project provided."
            raise Refusal(400, "UserProjectMissing", message)

    def _begin(self, request: Request, bucket: str, name: str) -> Answer:
        self._require(bucket, *_CREATE)
        fields = {
            "contentType": request.headers.get("Content-Type", ""),
            "storageClass": request.headers.get("x-goog-storage-class", ""),
        }
        if key := request.headers.get("x-goog-encryption-kms-key-name"):
            if not _KEY.fullmatch(key):
                raise Refusal(400, "InvalidArgument", f"Not the name of a key: {key}")
            fields["kmsKeyName"] = f"{key}/cryptoKeyVersions/1"
        kept: Json = {field: value for field, value in fields.items() if value}
        identity = self._uploads.begin(MultipartUpload(bucket, name, kept))
        return _told("InitiateMultipartUploadResult", _elements(Bucket=bucket, Key=name, UploadId=identity))

    def _put(self, request: Request, bucket: str, name: str) -> Answer:
        self._require(bucket, *_CREATE)
        query = request.query
        if not _NUMBER.fullmatch(query["partNumber"]):
            raise Refusal(400, "InvalidArgument", f"Not the number of a part: {query['partNumber']}")
        number, given = int(query["partNumber"]), sums(request.headers, {})
        part = self._uploads.put_part(bucket, name, query["uploadId"], number, request.body, sums=given)
        md5 = [f"md5={part.content.md5}"] if self._cloud.md5 else []
        hashes = ",".join([f"crc32c={part.content.crc32c}", *md5])
        return Answer(200, {**_HEADERS, "ETag": part.etag, "x-goog-hash": hashes})

    def _put_object(self, request: Request, bucket: str, name: str) -> Answer:
        self._require(bucket, "storage.objects.create")
        if name in self._cloud.bucket(bucket).objects:
            self._require(bucket, "storage.objects.delete")
        fields = {"contentType": kind} if (kind := request.headers.get("Content-Type")) else {}
        stored = self._cloud.put(
            bucket,
            name,
            Content([request.body] if len(request.body) else []),
            fields,
            conditions=Conditions(),
        )
        headers = {"ETag": f'"{stored.etag}"', "x-goog-generation": str(stored.generation)}
        return Answer(200, {**_HEADERS, **headers})

    def _copy_object(self, source: str, bucket: str, name: str) -> Answer:
        self._require(bucket, "storage.objects.create")
        source_bucket, _, source_name = unquote(source).removeprefix("/").partition("/")
        self._require(source_bucket, "storage.objects.get")
        found = self._cloud.get(source_bucket, source_name, Conditions())
        stored = self._cloud.put(bucket, name, found.content, found.fields, conditions=Conditions())
        return _told("CopyObjectResult", _elements(ETag=f'"{stored.etag}"', LastModified=stored.created))

    def _complete(self, request: Request, bucket: str, name: str) -> Answer:
        self._require(bucket, *_CREATE)
        if name in self._cloud.bucket(bucket).objects:
            self._require(bucket, "storage.objects.delete")
        stored = self._uploads.complete(bucket, name, request.query["uploadId"], _parts(bytes(request.body)))
        headers = {
            "x-goog-generation": str(stored.generation),
            "x-goog-metageneration": "1",
            "x-goog-hash": f"crc32c={stored.content.crc32c}",
        }
        where = f"http://{request.headers['Host']}/{bucket}/{quote(name)}"
        told = _elements(Location=where, Bucket=bucket, Key=name, ETag=f'"{stored.etag}"')
        return _told("CompleteMultipartUploadResult", told, headers)

    def _list_objects(self, bucket: str, query: Mapping[str, str]) -> Answer:
        self._require(bucket, "storage.objects.list")
        asked = {"prefix": query.get("prefix", ""), "delimiter": query.get("delimiter", "")}
        asked |= {"pageToken": query.get("continuation-token", "")}
        page = self._cloud.list(bucket, {name: value for name, value in asked.items() if value})
        told = _elements(Name=bucket, Prefix=asked["prefix"], IsTruncated=str(bool(page.token)).lower())
        if page.token:
            told += _elements(NextContinuationToken=page.token)
        for one in page.items:
            inner = _elements(
                Key=one.name, Size=str(one.content.size), ETag=one.etag, LastModified=one.created
            )
            told += f"<Contents>{inner}</Contents>"
        for prefix in page.prefixes:
            told += f"<CommonPrefixes>{_elements(Prefix=prefix)}</CommonPrefixes>"
        return _told("ListBucketResult", told)

    def _list(self, bucket: str, query: Mapping[str, str]) -> Answer:
        self._require(bucket, "storage.multipartUploads.list")
        if "delimiter" in query or "encoding-type" in query:
            raise Refusal(501, "NotImplemented", "Neither delimiter nor encoding-type is served here")
        prefix, most = query.get("prefix", ""), query.get("max-uploads", _MOST_LISTED)
        if not _NUMBER.fullmatch(most) or int(most) < 1:
            raise Refusal(400, "InvalidArgument", f"Not a number of uploads: {most}")
        key_marker, id_marker = query.get("key-marker", ""), query.get("upload-id-marker", "")
        page = self._uploads.list(bucket, prefix, key_marker, id_marker, int(most))
        told = _elements(Bucket=bucket, Prefix=prefix, KeyMarker=key_marker, UploadIdMarker=id_marker)
        told += _elements(MaxUploads=most, IsTruncated=str(page.truncated).lower())
        if page.truncated:
            last = page.uploads[-1]
            told += _elements(NextKeyMarker=last.name, NextUploadIdMarker=last.identity)
        for one in page.uploads:
            started = one.started.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            inner = _elements(Key=one.name, UploadId=one.identity, StorageClass="STANDARD", Initiated=started)
            told += f"<Upload>{inner}</Upload>"
        return _told("ListMultipartUploadsResult", told)

    def _require(self, bucket: str, *permissions: str) -> None:
        for permission in permissions:
            self._permissions.require(bucket, permission)


def _parts(body: bytes) -> Sequence[tuple[int, str]]:
    """Return number and entity tag of the parts that a completion names."""
    try:
        root = ET.fromstring(body)  # noqa: S314 - of a client of the tests
        return [(int(part.findtext("{*}PartNumber", "")), part.findtext("{*}ETag", "")) for part in root]
    except (ET.ParseError, ValueError):
        raise Refusal(400, "MalformedXML", "The XML you provided was not well-formed.") from None


def _told(root: str, body: str, headers: Mapping[str, str] | None = None) -> Answer:
    page = f"{_DECLARATION}<{root} xmlns='{_NAMESPACE}'>{body}</{root}>"
    return _document(page, headers or {}, 200)


def _document(page: str, headers: Mapping[str, str], status: int) -> Answer:
    kind = {"Content-Type": "application/xml; charset=UTF-8"}
    return Answer(status, {**_HEADERS, **kind, **headers}, [memoryview(page.encode())])


def _elements(**texts: str) -> str:
    return "".join(f"<{name}>{escape(value)}</{name}>" for name, value in texts.items())
