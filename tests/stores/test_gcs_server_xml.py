"""The tests' own Google Cloud Storage keeps the rules of multipart uploads by the XML API.

As of Google's reference: "XML API multipart uploads" and "HTTP status and error codes for XML".
"""

from __future__ import annotations

import http.client
import re
import uuid
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from html import unescape
from urllib.parse import quote, urlencode, urlsplit

import pytest

from cloudckpt.backends.checksums import CRC32C
from support.gcs import GCSServer, gcs_server

_PART = 5 << 20


@dataclass(frozen=True, slots=True)
class Said:
    status: int
    headers: Mapping[str, str]
    body: str

    @property
    def code(self) -> tuple[int, str]:
        return self.status, self.of("Code")

    def of(self, element: str) -> str:
        found = re.search(f"<{element}>(.*?)</{element}>", self.body)
        return unescape(found[1]) if found else ""

    def all(self, element: str) -> list[str]:
        return [unescape(one) for one in re.findall(f"<{element}>(.*?)</{element}>", self.body)]


class Client:
    """Requests of the XML API on a bucket, by default a new one."""

    def __init__(self, server: GCSServer, bucket: str | None = None) -> None:
        self.server = server
        self.bucket = server.new_bucket() if bucket is None else bucket

    def ask(
        self,
        method: str,
        name: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        markers: Mapping[str, str] | None = None,
        **query: str | int,
    ) -> Said:
        where = f"/{self.bucket}/{quote(name)}" if name else f"/{self.bucket}"
        connection = http.client.HTTPConnection(urlsplit(self.server.endpoint).netloc, timeout=60)
        with closing(connection):
            where += f"?{urlencode({**query, **(markers or {})})}"
            connection.request(method, where, body, dict(headers or {}))
            answer = connection.getresponse()
            told = {key.lower(): value for key, value in answer.getheaders()}
            return Said(answer.status, told, answer.read().decode())

    def begin(self, name: str = "a/name", headers: Mapping[str, str] | None = None) -> str:
        said = self.ask("POST", name, headers=headers, uploads="")
        assert (said.status, said.of("Bucket"), said.of("Key")) == (200, self.bucket, name)
        return said.of("UploadId")

    def part(self, identity: str, number: int, data: bytes, **headers: str) -> Said:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("PUT", "a/name", data, given, partNumber=number, uploadId=identity)

    def complete(self, identity: str, *parts: tuple[int, str], name: str = "a/name") -> Said:
        told = "".join(f"<Part><PartNumber>{n}</PartNumber><ETag>{tag}</ETag></Part>" for n, tag in parts)
        document = f"<CompleteMultipartUpload>{told}</CompleteMultipartUpload>".encode()
        return self.ask("POST", name, document, uploadId=identity)


@pytest.fixture
def client(gcs: GCSServer) -> Client:
    gcs.reset()
    return Client(gcs)


def test_parts_in_any_order_make_an_object_that_is_invisible_until_then(client: Client) -> None:
    identity = client.begin(headers={"Content-Type": "text/plain", "x-goog-storage-class": "NEARLINE"})
    last = client.part(identity, 7, b"last")
    client.part(identity, 2, b"replaced")
    first, dropped = client.part(identity, 2, bytes(_PART)), client.part(identity, 9, b"dropped")
    assert client.server.names(client.bucket, "") == []
    assert dropped.status == 200
    said = client.complete(identity, (2, first.headers["etag"]), (7, last.headers["etag"]))
    data = bytes(_PART) + b"last"
    found = client.server.resource(client.bucket, "a/name")
    assert said.status == 200 and said.of("ETag")
    assert said.headers["x-goog-generation"] == found["generation"]
    assert said.headers["x-goog-hash"] == f"crc32c={found['crc32c']}"
    assert client.server.read(client.bucket, "a/name") == data
    assert (found["contentType"], found["storageClass"]) == ("text/plain", "NEARLINE")
    assert "md5Hash" not in found
    assert client.complete(identity, (2, first.headers["etag"])).code == (404, "NoSuchUpload")


def test_a_part_is_compared_with_its_checksum(client: Client) -> None:
    identity, right = client.begin(), CRC32C.text(CRC32C.of(b"data")).partition(":")[2]
    said = client.part(identity, 1, b"data", x_goog_hash=f"crc32c={right}")
    assert said.status == 200 and f"crc32c={right}" in said.headers["x-goog-hash"]
    assert client.part(identity, 1, b"tidy", x_goog_hash=f"crc32c={right}").code == (400, "BadDigest")
    assert client.part(identity, 1, b"data", x_goog_hash="crc32c=?").code == (400, "InvalidArgument")


@pytest.mark.parametrize("number", [0, 10_001, "x"])
def test_a_number_that_no_part_has_is_refused(client: Client, number: int) -> None:
    assert client.part(client.begin(), number, b"data").code == (400, "InvalidArgument")


def test_a_completion_that_does_not_fit_is_refused_and_the_upload_stays(client: Client) -> None:
    identity = client.begin()
    tags = {number: client.part(identity, number, b"data").headers["etag"] for number in (1, 2)}
    one, two = (1, tags[1]), (2, tags[2])
    refused = {
        "EntityTooSmall": (one, two),
        "InvalidPart": (one, (3, tags[2])),
        "InvalidPartOrder": (two, one),
        "MalformedCompleteMultipartUploadRequest": (),
    }
    for code, parts in refused.items():
        assert client.complete(identity, *parts).code == (400, code)
    assert client.complete(identity, (1, tags[2])).code == (400, "InvalidPart")
    assert client.ask("POST", "a/name", b"<Complete", uploadId=identity).code == (400, "MalformedXML")
    assert client.complete(identity, one, name="another").code == (404, "NoSuchUpload")
    assert client.server.names(client.bucket, "") == []
    assert client.complete(identity, one).status == 200


def test_an_aborted_upload_is_gone(client: Client) -> None:
    identity = client.begin()
    assert client.ask("DELETE", "a/name", uploadId=identity).status == 204
    assert client.ask("DELETE", "a/name", uploadId=identity).code == (404, "NoSuchUpload")
    assert client.part(identity, 1, b"data").code == (404, "NoSuchUpload")


def test_uploads_are_listed_in_pages_by_prefix(client: Client) -> None:
    names = ["a/1", "a/1", "a/2", "b", "é&<"]
    identities = {client.begin(name) for name in names}
    assert client.ask("GET", "", uploads="", prefix="a/").all("Key") == ["a/1", "a/1", "a/2"]
    assert client.ask("GET", "", uploads="", prefix="é&<").all("Key") == ["é&<"]
    found, markers = list[tuple[str, str]](), dict[str, str]()
    for _ in names:
        page = client.ask("GET", "", markers={"max-uploads": "1", **markers}, uploads="")
        found += zip(page.all("Key"), page.all("UploadId"), strict=True)
        markers = {"key-marker": page.of("NextKeyMarker"), "upload-id-marker": page.of("NextUploadIdMarker")}
        assert page.of("IsTruncated") == ("true" if len(found) < len(names) else "false")
    assert {identity for _, identity in found} == identities
    assert [name for name, _ in found][:4] == names[:4]
    assert client.ask("GET", "", markers={"key-marker": "a/1"}, uploads="").all("Key")[0] == "a/2"


def test_errors_are_told_in_xml(client: Client, gcs: GCSServer) -> None:
    missing = Client(gcs, f"missing-{uuid.uuid4().hex[:8]}")
    assert missing.ask("POST", "name", uploads="").code == (404, "NoSuchBucket")
    assert missing.ask("GET", "", uploads="").code == (404, "NoSuchBucket")
    assert client.ask("POST", "name").code == (405, "MethodNotAllowed")
    gcs.spoil({"method": "POST", "path": "uploads", "do": "status 503"})
    assert client.ask("POST", "name", uploads="").code == (503, "ServiceUnavailable")
    gcs.reset()


@pytest.mark.parametrize(
    ("permission", "refused"),
    [
        ("storage.multipartUploads.create", ["begin", "part", "complete"]),
        ("storage.objects.create", ["begin", "part", "complete"]),
        ("storage.multipartUploads.abort", ["abort"]),
        ("storage.multipartUploads.list", ["list"]),
        ("storage.objects.delete", []),
    ],
)
def test_each_request_wants_its_permissions(client: Client, permission: str, refused: list[str]) -> None:
    identity = client.begin()
    tag = client.part(identity, 1, b"data").headers["etag"]
    client.server.deny(client.bucket, permission)
    said = {
        "begin": client.ask("POST", "other", uploads=""),
        "part": client.part(identity, 2, b"data"),
        "list": client.ask("GET", "", uploads=""),
        "complete": client.complete(identity, (1, tag)),
        "abort": client.ask("DELETE", "a/name", uploadId=identity),
    }
    assert [name for name, one in said.items() if one.code == (403, "AccessDenied")] == sorted(
        refused, key=list(said).index
    )
    client.server.deny(client.bucket)


def test_who_replaces_an_object_deletes_it(client: Client) -> None:
    client.server.write(client.bucket, "a/name", b"there")
    identity = client.begin()
    tag = client.part(identity, 1, b"data").headers["etag"]
    client.server.deny(client.bucket, "storage.objects.delete")
    assert client.complete(identity, (1, tag)).code == (403, "AccessDenied")
    client.server.deny(client.bucket)
    assert client.complete(identity, (1, tag)).status == 200


def test_a_requester_pays(gcs: GCSServer) -> None:
    client = Client(gcs, gcs.new_bucket(billing={"requesterPays": True}))
    assert client.ask("POST", "name", uploads="").code == (400, "UserProjectMissing")
    assert client.ask("POST", "name", headers={"x-goog-user-project": "p"}, uploads="").status == 200


def test_the_xml_api_can_be_off(gcs: GCSServer) -> None:
    assert Client(gcs, gcs.new_bucket(xml=False)).ask("POST", "name", uploads="").status == 404
    with gcs_server("--no-xml") as server:
        assert Client(server).ask("POST", "name", uploads="").status == 404
