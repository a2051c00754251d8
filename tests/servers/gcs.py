"""Questions for GCS servers about the JSON and XML APIs, with the answers that Google documents."""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

import urllib3
from awscrt import checksums

from servers.questions import NotAskedError, Question, Topic, outcome_of_race, yes_or_no

_CHUNK = 256 << 10
_LEAST = 5 << 20
"""Bytes of every part of a multipart upload but the last."""
_RACERS = 16
_OTHER = 1234567890
"""A generation that no object has."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def said(self) -> str:
        return str(self.status)

    @property
    def ok(self) -> bool:
        return self.status in range(200, 300)

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    def needed(self) -> Answer:
        """Return itself.

        Raises:
            NotAskedError: The request failed, and with it the set-up of a question.
        """
        if not self.ok:
            raise NotAskedError(self.status)
        return self


@dataclass(frozen=True, slots=True)
class GCSBucket:
    """A bucket of a GCS server."""

    endpoint: str
    name: str
    http: urllib3.PoolManager

    @classmethod
    def fresh(cls, endpoint: str) -> GCSBucket:
        """Make a bucket."""
        http = urllib3.PoolManager(retries=False, timeout=60, maxsize=20)
        bucket = cls(endpoint, f"bucket-{uuid.uuid4().hex[:12]}", http)
        body = json.dumps({"name": bucket.name}).encode()
        bucket.ask(
            "POST", f"{endpoint}/storage/v1/b?project=tests", body, {"Content-Type": "application/json"}
        ).needed()
        return bucket

    def ask(
        self, method: str, url: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send a request; a GET once more where the server had closed the idle connection."""
        try:
            response = self.http.request(method, url, body=body, headers=headers, redirect=False)
        except urllib3.exceptions.ProtocolError:
            if method != "GET":
                raise
            response = self.http.request(method, url, body=body, headers=headers, redirect=False)
        return Answer(response.status, response.headers, response.data)

    def object(self, name: str, more: str = "", **query: str | int) -> str:
        """Return the URL of an object's resource."""
        return f"{self.endpoint}/storage/v1/b/{self.name}/o/{quote(name, safe='')}{more}?{urlencode(query)}"

    def insert(self, name: str, body: bytes = b"body", **query: str | int) -> Answer:
        where = {"uploadType": "media", "name": name, **query}
        return self.ask("POST", self._upload(where), body, {"Content-Type": "application/octet-stream"})

    def related(self, name: str, body: bytes = b"body", crc32c: str = "", **query: str | int) -> Answer:
        """Insert an object with its resource in one request, as a multipart upload."""
        resource = {"name": name, **({"crc32c": crc32c} if crc32c else {})}
        parts = (
            b"--edge\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n"
            + json.dumps(resource).encode(),
            b"\r\n--edge\r\nContent-Type: application/octet-stream\r\n\r\n" + body + b"\r\n--edge--\r\n",
        )
        kind = "multipart/related; boundary=edge"
        return self.ask(
            "POST",
            self._upload({"uploadType": "multipart", "name": name, **query}),
            b"".join(parts),
            {"Content-Type": kind},
        )

    def existing(self, body: bytes = b"body") -> tuple[str, int]:
        """Put an object under a fresh name; its name and its generation."""
        name = fresh_name()
        return name, int(self.insert(name, body).needed().json["generation"])

    def begin(self, name: str, **query: str | int) -> str:
        """Begin a resumable session and return its URL."""
        where = {"uploadType": "resumable", "name": name, **query}
        begun = self.ask("POST", self._upload(where), b"{}", {"Content-Type": "application/json"}).needed()
        found = urlsplit(begun.headers["Location"])
        own = urlsplit(self.endpoint)  # some name another host than the one that was asked
        return urlunsplit((own.scheme, own.netloc, found.path, found.query, ""))

    def chunk(self, session: str, first: int, body: bytes, total: str = "*") -> Answer:
        last = f"{first}-{first + len(body) - 1}" if body else "*"
        return self.ask("PUT", session, body, {"Content-Range": f"bytes {last}/{total}"})

    def xml(
        self,
        method: str,
        name: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        **query: str | int,
    ) -> Answer:
        """Make a request of the XML API, on the bucket where there is no name."""
        path = f"{self.name}/{quote(name)}" if name else self.name
        return self.ask(method, f"{self.endpoint}/{path}?{urlencode(query)}", body, headers)

    def begin_xml(self, name: str) -> str:
        """Begin a multipart upload and return its ID."""
        begun = self.xml("POST", name, headers={"Content-Type": "application/octet-stream"}, uploads="")
        found = re.search(rb"<UploadId>([^<]+)</UploadId>", begun.needed().body)
        if found is None:
            raise NotAskedError(begun.status)
        return found[1].decode()

    def exists(self, name: str) -> bool:
        return self.ask("GET", self.object(name)).status == 200

    def read(self, name: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.ask("GET", self.object(name, alt="media"), headers=headers)

    def _upload(self, query: Mapping[str, str | int]) -> str:
        return f"{self.endpoint}/upload/storage/v1/b/{self.name}/o?{urlencode(query)}"


def fresh_name() -> str:
    """Return a name that no object has."""
    return f"folder/name-{uuid.uuid4().hex}"


Insert = Callable[..., Answer]
"""`GCSBucket.insert` (one body) or `GCSBucket.related` (multipart)."""


def _insert_new(bucket: GCSBucket, insert: Insert, *, existing: bool) -> str:
    name = bucket.existing()[0] if existing else fresh_name()
    return insert(bucket, name, ifGenerationMatch=0).said


def _race(bucket: GCSBucket, insert: Insert) -> str:
    name = fresh_name()

    def wins(racer: int) -> bool:
        try:
            return insert(bucket, name, b"%d" % racer, ifGenerationMatch=0).ok
        except urllib3.exceptions.HTTPError:
            return False  # gcp-storage-emulator resets some of many connections

    with ThreadPoolExecutor(_RACERS) as pool:
        return outcome_of_race(sum(pool.map(wins, range(_RACERS))))


def _insert_over(bucket: GCSBucket, insert: Insert, *, right: bool) -> str:
    name, generation = bucket.existing()
    return insert(bucket, name, ifGenerationMatch=generation if right else _OTHER).said


def _session_new(bucket: GCSBucket, *, existing: bool) -> str:
    """End a session that was begun with ifGenerationMatch=0; an object may appear in between."""
    name = fresh_name()
    session = bucket.begin(name, ifGenerationMatch=0)
    if existing:
        bucket.insert(name).needed()
    return bucket.chunk(session, 0, b"body", "4").said


def _session_over(bucket: GCSBucket, *, right: bool) -> str:
    name, generation = bucket.existing()
    session = bucket.begin(name, ifGenerationMatch=generation)
    if not right:
        bucket.insert(name, b"other").needed()
    return bucket.chunk(session, 0, b"body", "4").said


def _rewrite(bucket: GCSBucket, *, right: bool) -> str:
    name, generation = bucket.existing()
    condition = generation if right else _OTHER
    to = f"/rewriteTo/b/{bucket.name}/o/{quote(fresh_name(), safe='')}"
    return bucket.ask("POST", bucket.object(name, to, ifSourceGenerationMatch=condition)).said


def _rewrite_new(bucket: GCSBucket) -> str:
    name, _ = bucket.existing()
    to = f"/rewriteTo/b/{bucket.name}/o/{quote(bucket.existing()[0], safe='')}"
    return bucket.ask("POST", bucket.object(name, to, ifGenerationMatch=0)).said


def _compose(bucket: GCSBucket) -> str:
    names = [bucket.existing()[0], bucket.existing(b"more")[0]]
    to = fresh_name()
    body = json.dumps({"sourceObjects": [{"name": name} for name in names]}).encode()
    answer = bucket.ask("POST", bucket.object(to, "/compose"), body, {"Content-Type": "application/json"})
    return (
        answer.said if not answer.ok or bucket.read(to).body == b"bodymore" else f"{answer.said}, other bytes"
    )


def _delete_if(bucket: GCSBucket) -> str:
    return bucket.ask("DELETE", bucket.object(bucket.existing()[0], ifGenerationMatch=_OTHER)).said


def _read_if(bucket: GCSBucket) -> str:
    name = bucket.existing()[0]
    return bucket.ask("GET", bucket.object(name, alt="media", ifGenerationMatch=_OTHER)).said


def _read_generation(bucket: GCSBucket) -> str:
    name = bucket.existing()[0]
    return bucket.ask("GET", bucket.object(name, alt="media", generation=_OTHER)).said


def _delete(bucket: GCSBucket, *, existing: bool) -> str:
    name = bucket.existing()[0] if existing else fresh_name()
    return bucket.ask("DELETE", bucket.object(name)).said


def _batch(bucket: GCSBucket) -> tuple[Answer, bool]:
    names = [bucket.existing()[0] for _ in range(2)]
    parts = "".join(
        f"--edge\r\nContent-Type: application/http\r\nContent-ID: <{number}>\r\n\r\n"
        f"DELETE /storage/v1/b/{bucket.name}/o/{quote(name, safe='')} HTTP/1.1\r\n\r\n\r\n"
        for number, name in enumerate(names)
    )
    kind = "multipart/mixed; boundary=edge"
    body = f"{parts}--edge--\r\n".encode()
    answer = bucket.ask("POST", f"{bucket.endpoint}/batch/storage/v1", body, {"Content-Type": kind})
    return answer, not any(bucket.exists(name) for name in names)


def _batch_deletes(bucket: GCSBucket) -> str:
    answer, gone = _batch(bucket)
    return answer.said if gone or not answer.ok else f"{answer.said}, kept"


def _batch_names(bucket: GCSBucket) -> str:
    answer, _ = _batch(bucket)
    answer.needed()
    return yes_or_no(len(re.findall(rb"content-id:\s*<?response-", answer.body, re.IGNORECASE)) == 2)


def _status_of_fresh(bucket: GCSBucket) -> str:
    name = fresh_name()
    answer = bucket.chunk(bucket.begin(name), 0, b"")
    return f"{answer.said}, object appears" if bucket.exists(name) else answer.said


def _status_of_begun(bucket: GCSBucket) -> str:
    session = bucket.begin(fresh_name())
    first = bucket.chunk(session, 0, bytes(_CHUNK))
    if first.status != 308:
        return first.said
    answer = bucket.chunk(session, 0, b"")
    return f"{answer.said}, {answer.headers.get('Range', 'no Range')}"


def _invisible(bucket: GCSBucket) -> str:
    name = fresh_name()
    bucket.chunk(bucket.begin(name), 0, bytes(_CHUNK))
    return yes_or_no(not bucket.exists(name))


def _ended_late(bucket: GCSBucket) -> str:
    """End a session by one empty request with the number of bytes."""
    name = fresh_name()
    session = bucket.begin(name)
    bucket.chunk(session, 0, bytes(_CHUNK))
    answer = bucket.chunk(session, 0, b"", str(_CHUNK))
    return (
        answer.said
        if not answer.ok or bucket.read(name).body == bytes(_CHUNK)
        else f"{answer.said}, other bytes"
    )


def _chunk_again(bucket: GCSBucket) -> str:
    name = fresh_name()
    session = bucket.begin(name)
    for _ in range(2):
        bucket.chunk(session, 0, bytes(_CHUNK))
    bucket.chunk(session, 0, b"", str(_CHUNK))
    size = len(bucket.read(name).body)
    return {_CHUNK: "taken once", 2 * _CHUNK: "appended twice"}.get(size, "refused")


def _odd_chunk(bucket: GCSBucket) -> str:
    session = bucket.begin(fresh_name())
    bucket.chunk(session, 0, b"x" * 1000)
    held = bucket.chunk(session, 0, b"").headers.get("Range")
    return "kept" if held == "bytes=0-999" else "not kept"


def _ended_again(bucket: GCSBucket) -> str:
    session = bucket.begin(fresh_name())
    bucket.chunk(session, 0, b"body", "4").needed()
    return bucket.chunk(session, 0, b"", "4").said


def _empty_session(bucket: GCSBucket) -> str:
    name = fresh_name()
    answer = bucket.chunk(bucket.begin(name), 0, b"", "0")
    return answer.said if not answer.ok or bucket.exists(name) else f"{answer.said}, no object"


def _cancelled(bucket: GCSBucket) -> tuple[str, str]:
    session = bucket.begin(fresh_name())
    bucket.chunk(session, 0, bytes(_CHUNK))
    return session, bucket.ask("DELETE", session).said


def _cancel(bucket: GCSBucket) -> str:
    return _cancelled(bucket)[1]


def _after_cancel(bucket: GCSBucket) -> str:
    answer = bucket.chunk(_cancelled(bucket)[0], _CHUNK, b"body", str(_CHUNK + 4))
    return "refused" if answer.status in range(400, 500) else answer.said


def _begin_xml(bucket: GCSBucket) -> str:
    return bucket.xml("POST", fresh_name(), headers={"Content-Type": "text/plain"}, uploads="").said


def _part_xml(
    bucket: GCSBucket, name: str, identity: str, body: bytes, *, number: int = 1, crc32c: str = ""
) -> Answer:
    given = {"x-goog-hash": f"crc32c={crc32c}"} if crc32c else {}
    return bucket.xml("PUT", name, body, given, partNumber=number, uploadId=identity)


def _part_checksum(bucket: GCSBucket, *, right: bool) -> str:
    name, crc32c = fresh_name(), _crc32c(b"body" if right else b"tidy")
    return _part_xml(bucket, name, bucket.begin_xml(name), b"body", crc32c=crc32c).said


def _part_names(bucket: GCSBucket) -> str:
    name = fresh_name()
    answer = _part_xml(bucket, name, bucket.begin_xml(name), b"body").needed()
    return yes_or_no(f"crc32c={_crc32c(b'body')}" in answer.headers.get("x-goog-hash", ""))


def _completed(bucket: GCSBucket, sizes: Mapping[int, int]) -> tuple[str, bytes, Answer]:
    """Complete an upload of parts of these sizes, sent in this order; its name, its bytes and the answer."""
    name, sent = fresh_name(), dict[int, tuple[str, bytes]]()
    identity = bucket.begin_xml(name)
    for number, size in sizes.items():
        body = bytes([number]) * size
        answer = _part_xml(bucket, name, identity, body, number=number).needed()
        sent[number] = answer.headers["ETag"], body
    told = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>{sent[number][0]}</ETag></Part>"
        for number in sorted(sent)
    )
    document = f"<CompleteMultipartUpload>{told}</CompleteMultipartUpload>".encode()
    answer = bucket.xml("POST", name, document, uploadId=identity)
    return name, b"".join(sent[number][1] for number in sorted(sent)), answer


def _complete_xml(bucket: GCSBucket, sizes: Mapping[int, int]) -> str:
    name, data, answer = _completed(bucket, sizes)
    return answer.said if not answer.ok or bucket.read(name).body == data else f"{answer.said}, other bytes"


def _completion_names(bucket: GCSBucket) -> str:
    _, data, answer = _completed(bucket, {1: 4})
    return yes_or_no(answer.needed().headers.get("x-goog-hash", "") == f"crc32c={_crc32c(data)}")


def _listed_xml(bucket: GCSBucket) -> str:
    name = fresh_name()
    identity = bucket.begin_xml(name)
    return yes_or_no(identity.encode() in bucket.xml("GET", "", uploads="", prefix=name).needed().body)


def _aborted_xml(bucket: GCSBucket, *, then: bool) -> str:
    name = fresh_name()
    identity = bucket.begin_xml(name)
    answer = bucket.xml("DELETE", name, uploadId=identity)
    return _part_xml(bucket, name, identity, b"body").said if then else answer.said


def _crc32c(body: bytes) -> str:
    return base64.b64encode(checksums.crc32c(body).to_bytes(4, "big")).decode()


def _resource_checksum(bucket: GCSBucket, *, right: bool) -> str:
    return bucket.related(fresh_name(), b"body", crc32c=_crc32c(b"body" if right else b"tidy")).said


def _header_checksum(bucket: GCSBucket) -> str:
    where = f"{bucket.endpoint}/upload/storage/v1/b/{bucket.name}/o?uploadType=media&name={fresh_name()}"
    return bucket.ask("POST", where, b"body", {"x-goog-hash": f"crc32c={_crc32c(b'tidy')}"}).said


def _checksum_named(bucket: GCSBucket) -> str:
    return yes_or_no(bucket.insert(fresh_name()).needed().json.get("crc32c") == _crc32c(b"body"))


def _session_checksum_named(bucket: GCSBucket) -> str:
    answer = bucket.chunk(bucket.begin(fresh_name()), 0, b"body", "4").needed()
    return yes_or_no(answer.json.get("crc32c") == _crc32c(b"body"))


def _list(bucket: GCSBucket, *, paged: bool) -> str:
    unique = fresh_name()
    names = [f"{unique}/a", f"{unique}/b/1", f"{unique}/c"]
    for name in (*names, f"{unique}-other"):
        bucket.insert(name).needed()
    where = f"{bucket.endpoint}/storage/v1/b/{bucket.name}/o"
    if not paged:
        query = urlencode({"prefix": f"{unique}/", "delimiter": "/"})
        page = bucket.ask("GET", f"{where}?{query}").needed().json
        found = [item["name"] for item in page.get("items", ())]
        return yes_or_no(found == [names[0], names[2]] and page.get("prefixes") == [f"{unique}/b/"])
    found, token = list[str](), dict[str, str]()
    for _ in range(len(names) + 1):
        query = urlencode({"prefix": f"{unique}/", "maxResults": 1, **token})
        page = bucket.ask("GET", f"{where}?{query}").needed().json
        items = [item["name"] for item in page.get("items", ())]
        if len(items) > 1:
            return "no"
        found += items
        if not page.get("nextPageToken"):
            break
        token = {"pageToken": page["nextPageToken"]}
    return yes_or_no(found == names)


def _range(bucket: GCSBucket, wanted: str, expected: bytes | None) -> str:
    answer = bucket.read(bucket.existing(b"0123456789")[0], {"Range": wanted})
    return answer.said if expected is None or answer.body == expected else f"{answer.said}, other bytes"


def _missing(bucket: GCSBucket) -> str:
    return bucket.read(fresh_name()).said


def _inserts(kind: str, insert: Insert) -> tuple[Question[GCSBucket], ...]:
    what = f"{kind} insert `ifGenerationMatch"
    return (
        Question(f"{what}=0`, new name", "200", partial(_insert_new, insert=insert, existing=False)),
        Question(f"{what}=0`, existing", "412", partial(_insert_new, insert=insert, existing=True)),
        Question(f"{what}=0`, race of 16", "one wins", partial(_race, insert=insert)),
        Question(f"{what}`, right", "200", partial(_insert_over, insert=insert, right=True)),
        Question(f"{what}`, wrong", "412", partial(_insert_over, insert=insert, right=False)),
    )


CONDITIONS = Topic(
    "Conditions",
    (
        *_inserts("multipart", GCSBucket.related),
        *_inserts("media", GCSBucket.insert),
        Question(
            "session with `ifGenerationMatch=0`, new name", "200", partial(_session_new, existing=False)
        ),
        Question("the same, an object appears before its end", "412", partial(_session_new, existing=True)),
        Question("session with `ifGenerationMatch`, right", "200", partial(_session_over, right=True)),
        Question("the same, replaced before its end", "412", partial(_session_over, right=False)),
        Question("rewrite `ifSourceGenerationMatch`, right", "200", partial(_rewrite, right=True)),
        Question("rewrite `ifSourceGenerationMatch`, wrong", "412", partial(_rewrite, right=False)),
        Question("rewrite `ifGenerationMatch=0`, existing", "412", _rewrite_new),
        Question("delete `ifGenerationMatch`, wrong", "412", _delete_if),
        Question("read `ifGenerationMatch`, wrong", "412", _read_if),
        Question("read of another generation", "404", _read_generation),
    ),
)
SESSIONS = Topic(
    "Resumable sessions",
    (
        Question("invisible until ended", "yes", _invisible),
        Question("status of a fresh session", "308", _status_of_fresh),
        Question("status after one chunk", f"308, bytes=0-{_CHUNK - 1}", _status_of_begun),
        Question("ended later by `bytes */N`", "200", _ended_late),
        Question("ended empty by `bytes */0`", "200", _empty_session),
        Question("ended twice", "200", _ended_again),
        Question("the same chunk twice", "taken once", _chunk_again),
        Question("1000 bytes as a chunk", "not kept", _odd_chunk),
        Question("cancel", "499", _cancel),
        Question("bytes for a cancelled session", "refused", _after_cancel),
    ),
)
MULTIPART = Topic(
    "Multipart uploads",
    (
        Question("begin", "200", _begin_xml),
        Question("a part, right crc32c in `x-goog-hash`", "200", partial(_part_checksum, right=True)),
        Question("a part, wrong crc32c in `x-goog-hash`", "400", partial(_part_checksum, right=False)),
        Question("the answer to a part names the crc32c", "yes", _part_names),
        Question("parts 7 and 2, sent in this order", "200", partial(_complete_xml, sizes={7: 4, 2: _LEAST})),
        Question("a part below 5 MiB, not the last", "400", partial(_complete_xml, sizes={1: 4, 2: 4})),
        Question("the answer to a completion names the crc32c", "yes", _completion_names),
        Question("listed by a whole name as prefix", "yes", _listed_xml),
        Question("abort", "204", partial(_aborted_xml, then=False)),
        Question("part of a gone upload", "404", partial(_aborted_xml, then=True)),
    ),
)
OBJECTS = Topic(
    "Deletes, checksums, reads and listings",
    (
        Question("delete", "204", partial(_delete, existing=True)),
        Question("delete, missing object", "404", partial(_delete, existing=False)),
        Question("batch of deletes", "200", _batch_deletes),
        Question("a batch's parts say whose answer they are", "yes", _batch_names),
        Question("compose", "200", _compose),
        Question("right crc32c in the resource", "200", partial(_resource_checksum, right=True)),
        Question("wrong crc32c in the resource", "400", partial(_resource_checksum, right=False)),
        Question("wrong crc32c in `x-goog-hash`", "400", _header_checksum),
        Question("an insert's answer names the crc32c", "yes", _checksum_named),
        Question("a session's last answer names the crc32c", "yes", _session_checksum_named),
        Question("listing in pages", "yes", partial(_list, paged=True)),
        Question("listing with prefix and delimiter", "yes", partial(_list, paged=False)),
        Question("range `bytes=2-4`", "206", partial(_range, wanted="bytes=2-4", expected=b"234")),
        Question("range `bytes=7-`", "206", partial(_range, wanted="bytes=7-", expected=b"789")),
        Question("range beyond the end", "416", partial(_range, wanted="bytes=20-29", expected=None)),
        Question("read of a missing object", "404", _missing),
    ),
)
TOPICS = (CONDITIONS, MULTIPART, SESSIONS, OBJECTS)
