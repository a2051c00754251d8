"""Signed requests to an S3 server, with exactly the headers that a question is about."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import re
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode

import urllib3
from awscrt import checksums
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from servers.questions import NotAskedError
from support.s3_server import S3Server


@dataclass(frozen=True, slots=True)
class Answer:
    """A response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def said(self) -> str:
        """The status as a table has it; S3 may send an error in the body of a 200."""
        return f"{self.status} with an error" if self.ok and b"<Error>" in self.body else str(self.status)

    @property
    def ok(self) -> bool:
        return self.status in range(200, 300)

    @property
    def etag(self) -> str:
        """The ETag without quotes."""
        return self.headers.get("ETag", "").strip('"')

    def all(self, tag: str) -> list[str]:
        """Return the texts of an XML element, in order."""
        return [html.unescape(text) for text in re.findall(f"<{tag}>([^<]*)</{tag}>", self.body.decode())]

    def one(self, tag: str) -> str:
        """Return the text of an XML element; empty where there is none."""
        return next(iter(self.all(tag)), "")

    def needed(self) -> Answer:
        """Return itself.

        Raises:
            NotAskedError: The request failed, and with it the set-up of a question.
        """
        if not self.ok:
            raise NotAskedError(self.status)
        return self


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket of an S3 server."""

    server: S3Server
    name: str
    secret: str = field(repr=False)
    http: urllib3.PoolManager

    @classmethod
    def fresh(cls, server: S3Server) -> Bucket:
        """Make a bucket."""
        http = urllib3.PoolManager(retries=False, timeout=60, maxsize=20)
        return cls(server, server.new_bucket(), server.secret, http)

    def ask(
        self,
        method: str,
        key: str = "",
        body: bytes = b"",
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a signed request."""
        more = f"?{urlencode(query)}" if query else ""
        url = f"{self.server.endpoint}/{self.name}/{quote(key)}{more}"
        request = AWSRequest(method, url, data=body, headers=dict(headers or {}))
        S3SigV4Auth(Credentials(self.server.key, self.secret), "s3", "us-east-1").add_auth(request)
        response = self.http.request(method, url, body=body, headers=dict(request.headers), redirect=False)
        return Answer(response.status, response.headers, response.data)

    def put(self, key: str, body: bytes = b"body", headers: Mapping[str, str] | None = None) -> Answer:
        return self.ask("PUT", key, body, headers=headers)

    def existing(self, body: bytes = b"body") -> tuple[str, str]:
        """Put an object under a fresh name; its key and its ETag without quotes."""
        key = fresh_key()
        return key, self.put(key, body).needed().etag

    def begin(self, key: str, headers: Mapping[str, str] | None = None) -> str:
        """Begin a multipart upload and return its id."""
        return self.ask("POST", key, query={"uploads": ""}, headers=headers).needed().one("UploadId")

    def part(
        self,
        key: str,
        upload: str,
        number: int = 1,
        body: bytes = b"body",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        return self.ask("PUT", key, body, {"partNumber": str(number), "uploadId": upload}, headers)

    def complete(
        self,
        key: str,
        upload: str,
        parts: Mapping[int, str],
        more: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Complete an upload, with more XML in each part if need be."""
        listed = "".join(
            f'<Part><PartNumber>{number}</PartNumber><ETag>"{etag}"</ETag>{more}</Part>'
            for number, etag in parts.items()
        )
        body = f'<CompleteMultipartUpload xmlns="{_NAMESPACE}">{listed}</CompleteMultipartUpload>'
        return self.ask("POST", key, body.encode(), {"uploadId": upload}, headers)

    def whole(self, key: str, headers: Mapping[str, str] | None = None) -> Answer:
        """Begin an upload, send one part and complete it with more headers."""
        upload = self.begin(key)
        return self.complete(key, upload, {1: self.part(key, upload).needed().etag}, headers=headers)

    def exists(self, key: str) -> bool:
        return self.ask("HEAD", key).status == 200

    def delete_many(self, *keys: str, with_: tuple[str, ...] = ()) -> Answer:
        """Ask for DeleteObjects with the named checksums of the request."""
        listed = "".join(f"<Object><Key>{html.escape(key)}</Key></Object>" for key in keys)
        body = f'<Delete xmlns="{_NAMESPACE}">{listed}</Delete>'.encode()
        headers = functools.reduce(lambda found, name: found | checksum(name, body), with_, dict[str, str]())
        return self.ask("POST", "", body, {"delete": ""}, headers)


_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


def fresh_key() -> str:
    """Return a key that no object has."""
    return f"key-{uuid.uuid4().hex}"


def checksum(name: str, body: bytes) -> dict[str, str]:
    """Return the header with a body's checksum: of Content-MD5, CRC32, CRC32C or CRC64NVME."""
    if name == "Content-MD5":
        return {"Content-MD5": _base64(hashlib.md5(body, usedforsecurity=False).digest())}
    value, width = {
        "CRC32": (zlib.crc32, 4),
        "CRC32C": (checksums.crc32c, 4),
        "CRC64NVME": (checksums.crc64nvme, 8),
    }[name]
    return {
        f"x-amz-checksum-{name.lower()}": _base64(value(body).to_bytes(width, "big")),
        "x-amz-sdk-checksum-algorithm": name,
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
