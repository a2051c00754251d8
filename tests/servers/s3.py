"""Questions for S3 servers, with the answers that AWS documents."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial

from servers.questions import NotAskedError, Question, Topic, outcome_of_race, yes_or_no
from servers.signed import Bucket, checksum, fresh_key

_RACERS = 16
_WRONG = "0" * 32
_MIB = 1 << 20


def _quoted(etag: str) -> str:
    return f'"{etag}"'


def _bare(etag: str) -> str:
    return etag


Form = Callable[[str], str]


def _create(bucket: Bucket, *, existing: bool) -> str:
    key = bucket.existing()[0] if existing else fresh_key()
    return bucket.put(key, headers={"If-None-Match": "*"}).said


def _race(bucket: Bucket) -> str:
    key = fresh_key()

    def wins(racer: int) -> bool:
        return bucket.put(key, b"%d" % racer, {"If-None-Match": "*"}).ok

    with ThreadPoolExecutor(_RACERS) as pool:
        return outcome_of_race(sum(pool.map(wins, range(_RACERS))))


def _update(bucket: Bucket, form: Form, *, right: bool) -> str:
    key, etag = bucket.existing()
    return bucket.put(key, b"new", {"If-Match": form(etag if right else _WRONG)}).said


def _update_missing(bucket: Bucket) -> str:
    return bucket.put(fresh_key(), headers={"If-Match": _quoted(_WRONG)}).said


def _complete_create(bucket: Bucket, *, existing: bool) -> str:
    key = bucket.existing()[0] if existing else fresh_key()
    return bucket.whole(key, {"If-None-Match": "*"}).said


def _refused_completion_keeps_upload(bucket: Bucket) -> str:
    key = bucket.existing()[0]
    upload = bucket.begin(key)
    etag = bucket.part(key, upload).needed().etag
    if bucket.complete(key, upload, {1: etag}, headers={"If-None-Match": "*"}).ok:
        raise NotAskedError
    return yes_or_no(bucket.complete(key, upload, {1: etag}).ok)


def _complete_update(bucket: Bucket, form: Form, *, right: bool) -> str:
    key, etag = bucket.existing()
    return bucket.whole(key, {"If-Match": form(etag if right else _WRONG)}).said


def _copy(bucket: Bucket, form: Form, *, right: bool, multipart: bool = False) -> str:
    key, etag = bucket.existing()
    if multipart:
        bucket.whole(key).needed()
        etag = bucket.ask("HEAD", key).needed().etag
    condition = form(etag if right else _WRONG)
    source = {"x-amz-copy-source": f"/{bucket.name}/{key}", "x-amz-copy-source-if-match": condition}
    return bucket.ask("PUT", fresh_key(), headers=source).said


def _copy_part(bucket: Bucket, form: Form, *, right: bool) -> str:
    key, etag = bucket.existing()
    to = fresh_key()
    condition = form(etag if right else _WRONG)
    source = {"x-amz-copy-source": f"/{bucket.name}/{key}", "x-amz-copy-source-if-match": condition}
    return bucket.part(to, bucket.begin(to), body=b"", headers=source).said


def _delete_many(bucket: Bucket, *names: str) -> str:
    keys = [bucket.existing()[0] for _ in range(2)]
    answer = bucket.delete_many(*keys, with_=names)
    gone = not any(bucket.exists(key) for key in keys)
    return answer.said if gone or not answer.ok else f"{answer.said}, kept"


def _delete(bucket: Bucket, *, existing: bool) -> str:
    key = bucket.existing()[0] if existing else fresh_key()
    answer = bucket.ask("DELETE", key)
    return f"{answer.said}, kept" if answer.ok and bucket.exists(key) else answer.said


def _checked(bucket: Bucket, name: str, *, right: bool) -> str:
    return bucket.put(fresh_key(), b"body", checksum(name, b"body" if right else b"tidy")).said


def _part_checked(bucket: Bucket, name: str, *, right: bool) -> str:
    key = fresh_key()
    declared = {} if name == "Content-MD5" else {"x-amz-checksum-algorithm": name}
    upload = bucket.begin(key, declared)
    return bucket.part(key, upload, 1, b"body", checksum(name, b"body" if right else b"tidy")).said


def _full_object(bucket: Bucket, *, right: bool) -> tuple[str, bool]:
    key = fresh_key()
    kind = {"x-amz-checksum-type": "FULL_OBJECT"}
    upload = bucket.begin(key, kind | {"x-amz-checksum-algorithm": "CRC64NVME"})
    header = checksum("CRC64NVME", b"body")
    value = header["x-amz-checksum-crc64nvme"]
    etag = bucket.part(key, upload, 1, b"body", header).needed().etag
    whole = checksum("CRC64NVME", b"body" if right else b"tidy")
    part = f"<ChecksumCRC64NVME>{value}</ChecksumCRC64NVME>"
    answer = bucket.complete(key, upload, {1: etag}, part, whole | kind)
    return answer.said, answer.one("ChecksumCRC64NVME") == value


def _full_object_taken(bucket: Bucket, *, right: bool) -> str:
    return _full_object(bucket, right=right)[0]


def _full_object_named(bucket: Bucket) -> str:
    said, named = _full_object(bucket, right=True)
    if said != "200":
        raise NotAskedError
    return yes_or_no(named)


def _stored_checksum(bucket: Bucket) -> str:
    key = fresh_key()
    header = checksum("CRC64NVME", b"body")
    bucket.put(key, b"body", header).needed()
    answer = bucket.ask("HEAD", key, headers={"x-amz-checksum-mode": "ENABLED"}).needed()
    return yes_or_no(answer.headers.get("x-amz-checksum-crc64nvme") == header["x-amz-checksum-crc64nvme"])


def _uploads_listed(bucket: Bucket, *, folder: bool) -> str:
    unique = fresh_key()
    keys = [f"{unique}/a/1", f"{unique}/a/2"]
    for key in (*keys, f"{unique}/b/3"):
        bucket.begin(key)
    prefix = f"{unique}/a/" if folder else keys[0]
    answer = bucket.ask("GET", query={"uploads": "", "prefix": prefix}).needed()
    return yes_or_no(sorted(answer.all("Key")) == (keys if folder else keys[:1]))


def _uploads_paged(bucket: Bucket) -> str:
    unique = fresh_key()
    keys = [f"{unique}/{number}" for number in range(3)]
    for key in keys:
        bucket.begin(key)
    found, marker = list[str](), dict[str, str]()
    for _ in range(len(keys) + 1):
        query = {"uploads": "", "prefix": f"{unique}/", "max-uploads": "2", **marker}
        page = bucket.ask("GET", query=query).needed()
        found += page.all("Key")
        if page.one("IsTruncated") != "true":
            break
        marker = {
            "key-marker": page.one("NextKeyMarker"),
            "upload-id-marker": page.one("NextUploadIdMarker"),
        }
    return yes_or_no(found == keys)


def _uploads_dated(bucket: Bucket) -> str:
    key = fresh_key()
    bucket.begin(key)
    initiated = bucket.ask("GET", query={"uploads": "", "prefix": key}).needed().one("Initiated")
    if not initiated:
        raise NotAskedError
    age = datetime.now(UTC) - datetime.fromisoformat(initiated)
    return yes_or_no(abs(age) < timedelta(hours=1))


def _abort(bucket: Bucket, *, twice: bool) -> str:
    key = fresh_key()
    query = {"uploadId": bucket.begin(key)}
    answer = bucket.ask("DELETE", key, query=query)
    return bucket.ask("DELETE", key, query=query).said if twice else answer.said


def _after_abort(bucket: Bucket, *, completion: bool) -> str:
    key = fresh_key()
    upload = bucket.begin(key)
    etag = bucket.part(key, upload).needed().etag
    bucket.ask("DELETE", key, query={"uploadId": upload}).needed()
    return (bucket.complete(key, upload, {1: etag}) if completion else bucket.part(key, upload)).said


def _complete_twice(bucket: Bucket) -> str:
    key = fresh_key()
    upload = bucket.begin(key)
    etag = bucket.part(key, upload).needed().etag
    bucket.complete(key, upload, {1: etag}).needed()
    return bucket.complete(key, upload, {1: etag}).said


def _invisible(bucket: Bucket) -> str:
    key = fresh_key()
    bucket.part(key, bucket.begin(key)).needed()
    listed = bucket.ask("GET", query={"list-type": "2", "prefix": key}).needed().all("Key")
    return yes_or_no(not listed and not bucket.exists(key))


def _in_parts(bucket: Bucket, *parts: tuple[int, int]) -> str:
    """Send parts of these numbers and bytes, and complete the upload."""
    key = fresh_key()
    upload = bucket.begin(key)
    etags = {number: bucket.part(key, upload, number, bytes(size)).needed().etag for number, size in parts}
    return bucket.complete(key, upload, etags).said


def _part_again(bucket: Bucket) -> str:
    key = fresh_key()
    upload = bucket.begin(key)
    bucket.part(key, upload, 1, b"old").needed()
    again = bucket.part(key, upload, 1, b"new")
    if not again.ok:
        return again.said
    bucket.complete(key, upload, {1: again.etag}).needed()
    return again.said if bucket.ask("GET", key).body == b"new" else f"{again.said}, old bytes"


def _list(bucket: Bucket, *, paged: bool) -> str:
    unique = fresh_key()
    keys = [f"{unique}/a", f"{unique}/b/1", f"{unique}/c"]
    for key in (*keys, f"{unique}-other"):
        bucket.put(key).needed()
    if not paged:
        query = {"list-type": "2", "prefix": f"{unique}/", "delimiter": "/"}
        page = bucket.ask("GET", query=query).needed()
        below = page.all("Prefix")
        return yes_or_no(page.all("Key") == [keys[0], keys[2]] and f"{unique}/b/" in below)
    found, token = list[str](), dict[str, str]()
    for _ in range(len(keys) + 1):
        page = bucket.ask(
            "GET", query={"list-type": "2", "prefix": f"{unique}/", "max-keys": "1", **token}
        ).needed()
        found += page.all("Key")
        if page.one("IsTruncated") != "true":
            break
        token = {"continuation-token": page.one("NextContinuationToken")}
    return yes_or_no(found == keys)


def _range(bucket: Bucket, wanted: str, expected: bytes | None) -> str:
    key = bucket.existing(b"0123456789")[0]
    answer = bucket.ask("GET", key, headers={"Range": wanted})
    return answer.said if expected is None or answer.body == expected else f"{answer.said}, other bytes"


def _read_if(bucket: Bucket) -> str:
    return bucket.ask("GET", bucket.existing()[0], headers={"If-Match": _quoted(_WRONG)}).said


def _missing(bucket: Bucket) -> str:
    return bucket.ask("GET", fresh_key()).said


def _bad_secret(bucket: Bucket) -> str:
    return replace(bucket, secret="wrong-secret").put(fresh_key()).said  # noqa: S106 - wrong on purpose


def _etag_of_put(bucket: Bucket) -> str:
    answer = bucket.put(fresh_key(), b"body").needed()
    value = answer.headers.get("ETag", "")
    return "none" if not value else "quoted" if value.startswith('"') else "bare"


_CHECKSUMS = ("Content-MD5", "CRC32C", "CRC64NVME")
CONDITIONS = Topic(
    "Conditions",
    (
        Question("PUT `If-None-Match: *`, new name", "200", partial(_create, existing=False)),
        Question("PUT `If-None-Match: *`, existing", "412", partial(_create, existing=True)),
        Question("PUT `If-None-Match: *`, race of 16", "one wins", _race),
        Question("PUT `If-Match`, right", "200", partial(_update, form=_quoted, right=True)),
        Question("PUT `If-Match`, right, unquoted", "", partial(_update, form=_bare, right=True)),
        Question("PUT `If-Match`, wrong", "412", partial(_update, form=_quoted, right=False)),
        Question("PUT `If-Match`, wrong, unquoted", "412", partial(_update, form=_bare, right=False)),
        Question("PUT `If-Match`, missing object", "404", _update_missing),
        Question("Complete `If-None-Match: *`, new name", "200", partial(_complete_create, existing=False)),
        Question("Complete `If-None-Match: *`, existing", "412", partial(_complete_create, existing=True)),
        Question("a refused Complete keeps the upload", "yes", _refused_completion_keeps_upload),
        Question("Complete `If-Match`, right", "200", partial(_complete_update, form=_quoted, right=True)),
        Question(
            "Complete `If-Match`, right, unquoted", "", partial(_complete_update, form=_bare, right=True)
        ),
        Question("Complete `If-Match`, wrong", "412", partial(_complete_update, form=_quoted, right=False)),
        Question("GET `If-Match`, wrong", "412", _read_if),
    ),
)
COPIES = Topic(
    "Copies",
    (
        Question("copy, source `If-Match` right", "200", partial(_copy, form=_quoted, right=True)),
        Question("copy, source `If-Match` right, unquoted", "", partial(_copy, form=_bare, right=True)),
        Question("copy, source `If-Match` wrong", "412", partial(_copy, form=_quoted, right=False)),
        Question("copy, source `If-Match` wrong, unquoted", "412", partial(_copy, form=_bare, right=False)),
        Question(
            "copy of a multipart object, right",
            "200",
            partial(_copy, form=_quoted, right=True, multipart=True),
        ),
        Question(
            "copy of a multipart object, right, unquoted",
            "",
            partial(_copy, form=_bare, right=True, multipart=True),
        ),
        Question("part copy, source `If-Match` right", "200", partial(_copy_part, form=_quoted, right=True)),
        Question("part copy, source `If-Match` wrong", "412", partial(_copy_part, form=_quoted, right=False)),
    ),
)
DELETES = Topic(
    "Deletes",
    (
        Question("DeleteObject", "204", partial(_delete, existing=True)),
        Question("DeleteObject, missing object", "204", partial(_delete, existing=False)),
        Question("DeleteObjects with CRC32", "200", lambda bucket: _delete_many(bucket, "CRC32")),
        Question("DeleteObjects with Content-MD5", "200", lambda bucket: _delete_many(bucket, "Content-MD5")),
        Question(
            "DeleteObjects with both", "200", lambda bucket: _delete_many(bucket, "Content-MD5", "CRC32")
        ),
        Question("DeleteObjects with neither", "400", _delete_many),
    ),
)
CHECKSUMS = Topic(
    "Checksums",
    (
        *(
            Question(f"PUT, {word} {name}", status, partial(_checked, name=name, right=right))
            for name in _CHECKSUMS
            for right, word, status in ((True, "right", "200"), (False, "wrong", "400"))
        ),
        *(
            Question(f"UploadPart, {word} {name}", status, partial(_part_checked, name=name, right=right))
            for name in _CHECKSUMS
            for right, word, status in ((True, "right", "200"), (False, "wrong", "400"))
        ),
        Question("Complete, right FULL_OBJECT CRC64NVME", "200", partial(_full_object_taken, right=True)),
        Question("Complete, wrong FULL_OBJECT CRC64NVME", "400", partial(_full_object_taken, right=False)),
        Question("the answer names the FULL_OBJECT CRC64NVME", "yes", _full_object_named),
        Question("HEAD names the CRC64NVME that was put", "yes", _stored_checksum),
    ),
)
UPLOADS = Topic(
    "Uploads",
    (
        Question("invisible until completed", "yes", _invisible),
        Question("listed by a prefix that ends with /", "yes", partial(_uploads_listed, folder=True)),
        Question("listed by a whole key as prefix", "yes", partial(_uploads_listed, folder=False)),
        Question("listed in pages", "yes", _uploads_paged),
        Question("listed with the hour of their start", "yes", _uploads_dated),
        Question("abort", "204", partial(_abort, twice=False)),
        Question("abort of a gone upload", "404", partial(_abort, twice=True)),
        Question("part of a gone upload", "404", partial(_after_abort, completion=False)),
        Question("Complete of a gone upload", "404", partial(_after_abort, completion=True)),
        Question("Complete, twice", "", _complete_twice),
        Question("a part sent again", "200", _part_again),
        Question("parts 1 and 3 alone", "200", lambda bucket: _in_parts(bucket, (1, 5 * _MIB), (3, 1))),
        Question(
            "a part below 5 MiB, not the last", "400", lambda bucket: _in_parts(bucket, (1, _MIB), (2, 1))
        ),
        Question(
            "parts of different sizes",
            "200",
            lambda bucket: _in_parts(bucket, (1, 5 * _MIB), (2, 6 * _MIB), (3, 1)),
        ),
    ),
)
READS = Topic(
    "Reads and listings",
    (
        Question("ListObjectsV2 in pages", "yes", partial(_list, paged=True)),
        Question("ListObjectsV2 with prefix and delimiter", "yes", partial(_list, paged=False)),
        Question("range `bytes=2-4`", "206", partial(_range, wanted="bytes=2-4", expected=b"234")),
        Question("range `bytes=7-`", "206", partial(_range, wanted="bytes=7-", expected=b"789")),
        Question("range `bytes=-3`", "206", partial(_range, wanted="bytes=-3", expected=b"789")),
        Question("range beyond the end", "416", partial(_range, wanted="bytes=20-29", expected=None)),
        Question("GET of a missing object", "404", _missing),
        Question("ETag in the answer to a PUT", "quoted", _etag_of_put),
        Question("a wrong secret key", "403", _bad_secret),
    ),
)
TOPICS = (CONDITIONS, COPIES, DELETES, CHECKSUMS, UPLOADS, READS)
