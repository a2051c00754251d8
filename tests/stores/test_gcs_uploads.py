"""Multipart uploads of the GCS store: names, headers, checksums, lost answers and hostile documents."""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import unquote, urlsplit

import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt.backends.checksums import CRC32C
from cloudckpt.backends.errors import (
    AccessDeniedError,
    CheckpointError,
    ConfigurationError,
    IntegrityError,
    ObjectNotFoundError,
    StorageError,
    UnansweredError,
    UnsupportedError,
)
from cloudckpt.backends.manage.gc import collect_garbage
from cloudckpt.backends.save import stale_attempts
from cloudckpt.backends.stores.base import Part, Upload
from cloudckpt.backends.stores.gcs import client as gcs_client
from cloudckpt.backends.stores.gcs import xml as gcs_xml
from cloudckpt.backends.stores.gcs.endpoint import serves_xml
from cloudckpt.backends.stores.gcs.store import GCSStore
from support.gcs import GCSServer
from support.proxy import (
    AddHeaders,
    Answer,
    CutAnswer,
    CutRequest,
    DropHeaders,
    EditAnswer,
    FlipBit,
    LoseAnswer,
    Proxy,
    RawAnswer,
    Spoiling,
    proxied,
)

_PART = 5 << 20
_DATA = os.urandom(_PART + 100)
_FIRST, _LAST = memoryview(_DATA)[:_PART], memoryview(_DATA)[_PART:]

Opened = Callable[..., GCSStore]


@pytest.fixture(scope="module")
def gcs_proxy(gcs: GCSServer) -> Iterator[Proxy]:
    with proxied(gcs.endpoint) as made:
        yield made


@pytest.fixture
def bucket(gcs: GCSServer, gcs_proxy: Proxy) -> str:
    gcs.reset()
    gcs_proxy.forget()
    return gcs.new_bucket()


@pytest.fixture
def store(gcs_proxy: Proxy, bucket: str, open_gcs: Opened) -> GCSStore:
    """A store whose server was probed, behind the proxy."""
    return probed(open_gcs(gcs_proxy.endpoint, bucket), gcs_proxy)


def probed(store: GCSStore, proxy: Proxy) -> GCSStore:
    assert not store.part_limits.in_order
    proxy.forget()
    return store


def sent(store: GCSStore, name: str = "name") -> tuple[Upload, list[Part]]:
    """Begin an upload and send its two parts, the last one first."""
    upload = store.begin_upload(name)
    last = store.upload_part(upload, 2, _PART, [_LAST])
    return upload, [store.upload_part(upload, 1, 0, [_FIRST[:7], _FIRST[7:]]), last]


def whole(store: GCSStore, name: str = "name") -> bytes:
    return store.get(name)[0]


# Which uploads are used


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("https://storage.googleapis.com", True),
        ("https://STORAGE.googleapis.com:443", True),
        ("https://storage.mtls.googleapis.com", True),
        ("https://storage.me-central2.rep.googleapis.com", True),
        ("https://storage-xyz.p.googleapis.com", True),
        ("https://www.googleapis.com", False),
        ("https://private.googleapis.com", False),
        ("https://storage.example.org", False),
        ("http://127.0.0.1:4443", False),
    ],
)
def test_googles_endpoints_that_serve_the_xml_api_are_known(endpoint: str, expected: bool) -> None:
    assert serves_xml(endpoint) == expected


def test_the_probe_makes_four_requests_once_a_bucket_and_leaves_nothing(
    gcs: GCSServer, gcs_proxy: Proxy, bucket: str, open_gcs: Opened
) -> None:
    store = open_gcs(gcs_proxy.endpoint, bucket)
    for _ in range(2):
        assert not store.part_limits.in_order
    open_gcs(gcs_proxy.endpoint, bucket, "another run").begin_upload("name")
    assert [one.operation for one in gcs_proxy.all()] == [
        "CreateMultipartUpload",
        "UploadPart",
        "ListMultipartUploads",
        "AbortMultipartUpload",
        "CreateMultipartUpload",
    ]
    assert [one["name"] for one in gcs.sessions() if one["bucket"] == bucket] == ["another run/name"]


@pytest.mark.parametrize("operation", ["CreateMultipartUpload", "UploadPart", "ListMultipartUploads"])
def test_a_server_that_answers_a_part_of_the_probe_otherwise_has_sessions(
    gcs_proxy: Proxy, bucket: str, open_gcs: Opened, operation: str
) -> None:
    gcs_proxy.spoil(operation, [Answer(200, headers={"Content-Type": "application/xml"})])
    store = open_gcs(gcs_proxy.endpoint, bucket)
    assert store.part_limits.in_order and not store.probe().multipart
    assert store.begin_upload("name").upload_id.startswith(gcs_proxy.endpoint)


@pytest.mark.parametrize(
    "spoilings",
    [[Answer(503, "ServiceUnavailable")], [LoseAnswer()], [Answer(429, "SlowDown"), LoseAnswer()]],
    ids=["503", "lost", "429, lost"],
)
def test_a_transient_error_of_the_probe_decides_nothing(
    gcs: GCSServer, gcs_proxy: Proxy, bucket: str, open_gcs: Opened, spoilings: list[Spoiling]
) -> None:
    for operation in ("CreateMultipartUpload", "UploadPart", "ListMultipartUploads", "AbortMultipartUpload"):
        gcs_proxy.spoil(operation, spoilings)
    assert not open_gcs(gcs_proxy.endpoint, bucket).part_limits.in_order
    assert [one for one in gcs.sessions() if one["bucket"] == bucket] == []


def test_a_missing_bucket_is_named_by_the_probe(gcs: GCSServer, open_gcs: Opened) -> None:
    store = open_gcs(gcs.endpoint, "no-such-bucket")
    with pytest.raises(ObjectNotFoundError, match="no-such-bucket") as caught:
        _ = store.part_limits
    assert caught.value.uri == store.uri


@pytest.mark.parametrize("options", [{"part_size": "1MiB"}, {"memory_limit": "4MiB"}], ids=["part", "memory"])
def test_less_than_the_least_part_is_sent_by_a_session(
    gcs: GCSServer, bucket: str, open_gcs: Opened, options: Mapping[str, str]
) -> None:
    """These options meant sessions before there were multipart uploads."""
    store = open_gcs(gcs.endpoint, bucket, **options)
    assert store.part_limits.in_order and store.part_checksum is None
    assert store.begin_upload("name").upload_id.startswith("http")


def test_a_session_of_an_earlier_version_is_gone_on_with(
    gcs: GCSServer, bucket: str, open_gcs: Opened
) -> None:
    earlier, now = open_gcs(gcs.endpoint, bucket, part_size="1MiB"), open_gcs(gcs.endpoint, bucket)
    assert not now.part_limits.in_order
    uploads = [earlier.begin_upload(name) for name in ("one", "two")]
    assert all(now.is_pending(upload) for upload in uploads)
    part = now.upload_part(uploads[0], 1, 0, [memoryview(b"data")])
    assert now.complete_upload(uploads[0], [part]).size == 4
    now.abort_upload(uploads[1])
    assert not any(now.is_pending(upload) for upload in uploads)
    assert whole(now, "one") == b"data" and not now.holds("two")


# Names and headers


@pytest.mark.parametrize(
    "name",
    [
        "a/b c+d%2Fe&f=g?h#i;j:k@l!m$n'o(p)q*r,s[t]u",
        "ü/漢字/🙂",
        'quotes"<and>&amp;',
        "a/./b",
        "a/../b",
        "a//b",
        "%2e%2e/~x|y\\z^`{}",
        "tab\tand\x7f",
    ],
)
def test_an_object_may_have_any_name(gcs: GCSServer, store: GCSStore, bucket: str, name: str) -> None:
    upload, parts = sent(store, name)
    assert [one.upload for one in store.pending_uploads(name)] == [upload]
    assert store.is_pending(upload)
    assert store.complete_upload(upload, parts).name == name
    assert gcs.names(bucket, "") == [f"run/{name}"]
    assert gcs.read(bucket, f"run/{name}") == _DATA
    store.abort_upload(store.begin_upload(name))
    assert list(store.pending_uploads()) == []


def test_a_slash_of_a_name_stays_one_in_the_path(store: GCSStore, gcs_proxy: Proxy, bucket: str) -> None:
    store.begin_upload("folder/a name")
    (request,) = gcs_proxy.all()
    assert urlsplit(request.target).path == f"/{bucket}/run/folder/a%20name"
    assert unquote(urlsplit(request.target).query) == "uploads="


def test_what_is_sent_with_an_upload(gcs_proxy: Proxy, bucket: str, open_gcs: Opened) -> None:
    key = "projects/p/locations/eu/keyRings/r/cryptoKeys/k"
    options = {
        "storage_class": "NEARLINE",
        "kms_key_name": key,
        "storage_options": {"requester_pays": "my-project"},
    }
    store = probed(open_gcs(gcs_proxy.endpoint, bucket, **options), gcs_proxy)
    store.complete_upload(*sent(store))
    requests = {one.operation: one for one in gcs_proxy.all()}
    assert {one.headers.get("x-goog-user-project") for one in requests.values()} == {"my-project"}
    assert not any("userProject" in one.target for one in requests.values())
    begun, part = requests["CreateMultipartUpload"].headers, requests["UploadPart"].headers
    assert begun["x-goog-storage-class"] == "NEARLINE"
    assert begun["x-goog-encryption-kms-key-name"] == key
    assert begun["content-type"] == "application/octet-stream"
    assert part["x-goog-hash"] == f"crc32c={CRC32C.text(CRC32C.of(_FIRST)).partition(':')[2]}"
    assert requests["CompleteMultipartUpload"].headers["content-type"] == "application/xml"


def test_without_a_checksum_none_is_sent_and_that_of_the_answer_is_kept(
    gcs_proxy: Proxy, bucket: str, open_gcs: Opened
) -> None:
    store = probed(open_gcs(gcs_proxy.endpoint, bucket, checksum="none"), gcs_proxy)
    assert store.part_checksum is None
    upload, parts = sent(store)
    assert not any("x-goog-hash" in one.headers for one in gcs_proxy.seen("UploadPart"))
    assert [part.checksum for part in parts] == [CRC32C.text(CRC32C.of(data)) for data in (_FIRST, _LAST)]
    assert store.complete_upload(upload, parts).checksum == CRC32C.text(CRC32C.of(_DATA))


def test_an_upload_without_bytes_makes_an_empty_object(store: GCSStore, gcs_proxy: Proxy) -> None:
    upload = store.begin_upload("name")
    part = store.upload_part(upload, 1, 0, [memoryview(b"")])
    assert not store.holds("name")
    info = store.complete_upload(upload, [part])
    assert (info.size, info.version) == (0, store.stat("name").version)
    assert whole(store) == b"" and list(store.pending_uploads()) == []
    assert gcs_proxy.seen("UploadPart") == gcs_proxy.seen("CompleteMultipartUpload") == []
    with pytest.raises(StorageError, match="does not exist"):
        store.complete_upload(upload, [part])


# Checksums


def test_a_part_that_changes_on_its_way_is_refused(store: GCSStore, gcs_proxy: Proxy) -> None:
    upload = store.begin_upload("name")
    gcs_proxy.spoil("UploadPart", [FlipBit()])
    with pytest.raises(IntegrityError) as caught:
        store.upload_part(upload, 1, 0, [_FIRST])
    assert (caught.value.uri, caught.value.object_name) == (store.uri, "name")
    assert len(gcs_proxy.seen("UploadPart")) == 1


def test_a_part_of_which_the_server_names_another_checksum_is_refused(
    store: GCSStore, gcs_proxy: Proxy
) -> None:
    upload = store.begin_upload("name")
    gcs_proxy.spoil("UploadPart", [AddHeaders({"x-goog-hash": "crc32c=AAAAAA=="})])
    with pytest.raises(IntegrityError, match="crc32c:AAAAAA=="):
        store.upload_part(upload, 1, 0, [_FIRST])


def test_an_object_of_which_the_server_names_another_checksum_is_deleted(
    store: GCSStore, gcs_proxy: Proxy
) -> None:
    upload, parts = sent(store)
    gcs_proxy.spoil("CompleteMultipartUpload", [AddHeaders({"x-goog-hash": "crc32c=AAAAAA=="})])
    with pytest.raises(IntegrityError, match="its parts make"):
        store.complete_upload(upload, parts)
    assert not store.holds("name")


@pytest.mark.parametrize(
    "names", [["x-goog-hash"], ["x-goog-generation"], ["x-goog-hash", "x-goog-generation"]]
)
def test_a_completion_that_proves_nothing_is_looked_up(
    store: GCSStore, gcs_proxy: Proxy, names: list[str]
) -> None:
    upload, parts = sent(store)
    gcs_proxy.spoil("CompleteMultipartUpload", [DropHeaders(names)])
    info = store.complete_upload(upload, parts)
    assert len(gcs_proxy.seen("GetObject")) == 1
    assert info == store.stat("name")
    assert (info.size, info.checksum) == (len(_DATA), CRC32C.text(CRC32C.of(_DATA)))


def test_a_completion_that_names_the_checksum_is_not_looked_up(store: GCSStore, gcs_proxy: Proxy) -> None:
    info = store.complete_upload(*sent(store))
    assert [one.operation for one in gcs_proxy.all()] == [
        "CreateMultipartUpload",
        "UploadPart",
        "UploadPart",
        "CompleteMultipartUpload",
    ]
    found = store.stat("name")
    assert (info.size, info.version, info.checksum) == (found.size, found.version, found.checksum)


# Lost answers


@pytest.mark.parametrize(
    "lost", [LoseAnswer(), CutAnswer(20), RawAnswer(b"")], ids=["lost", "cut off", "empty"]
)
def test_a_completion_whose_answer_was_lost_is_found_by_the_object(
    store: GCSStore, gcs_proxy: Proxy, lost: Spoiling
) -> None:
    upload, parts = sent(store)
    gcs_proxy.spoil("CompleteMultipartUpload", [lost])
    info = store.complete_upload(upload, parts)
    assert (info.size, info.version) == (len(_DATA), store.stat("name").version)
    assert whole(store) == _DATA


def test_a_completion_that_was_carried_out_behind_a_503_is_found_by_the_object(
    store: GCSStore, gcs_proxy: Proxy
) -> None:
    upload, parts = sent(store)
    store.complete_upload(upload, parts)
    gcs_proxy.spoil("CompleteMultipartUpload", [Answer(503, "ServiceUnavailable")])
    assert store.complete_upload(upload, parts).size == len(_DATA)


def test_an_object_of_another_content_is_not_taken_for_the_lost_one(
    store: GCSStore, gcs_proxy: Proxy
) -> None:
    other = store.begin_upload("name")
    swapped = bytes(reversed(_DATA))
    store.complete_upload(other, [store.upload_part(other, 1, 0, [memoryview(swapped)])])
    upload, parts = sent(store)
    store.abort_upload(upload)
    gcs_proxy.spoil("CompleteMultipartUpload", [CutRequest(0)])
    with pytest.raises(StorageError, match="was completed or aborted"):
        store.complete_upload(upload, parts)
    assert whole(store) == swapped


def test_a_completion_that_may_have_been_carried_out_is_unanswered(
    gcs_proxy: Proxy, bucket: str, open_gcs: Opened
) -> None:
    store = probed(open_gcs(gcs_proxy.endpoint, bucket, retries=2), gcs_proxy)
    upload, parts = sent(store)
    gcs_proxy.spoil("CompleteMultipartUpload", [CutRequest(0), *[Answer(503, "ServiceUnavailable")] * 9])
    with pytest.raises(UnansweredError, match="one of 3 attempts was lost") as caught:
        store.complete_upload(upload, parts)
    assert caught.value.object_name == "name"


@pytest.mark.parametrize("name", ["name", "folder/name"])
def test_an_upload_that_was_begun_twice_is_pending_once(store: GCSStore, gcs_proxy: Proxy, name: str) -> None:
    beside = store.begin_upload(f"{name} beside")
    gcs_proxy.spoil("CreateMultipartUpload", [LoseAnswer(), LoseAnswer()])
    upload = store.begin_upload(name)
    assert {one.upload for one in store.pending_uploads()} == {upload, beside}


def test_an_upload_begun_twice_that_can_not_be_looked_for_is_logged(
    store: GCSStore, gcs_proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    gcs_proxy.spoil("CreateMultipartUpload", [LoseAnswer()])
    gcs_proxy.spoil("ListMultipartUploads", [Answer(403, "AccessDenied")])
    store.begin_upload("name")
    assert "a second upload of name may be pending" in caplog.text


# Refusals


@pytest.mark.parametrize(
    ("answer", "kind", "texts"),
    [
        (Answer(403, "AccessDenied"), AccessDeniedError, ("as the test asked", "multipartUploads.create")),
        (Answer(401, "AuthenticationRequired"), AccessDeniedError, ("refused the credentials", "Log in")),
        (Answer(404, "NoSuchBucket"), ObjectNotFoundError, ("does not exist", "Create it")),
        (Answer(404, "NoSuchUpload"), StorageError, ("was completed or aborted", "")),
        (Answer(400, "UserProjectMissing"), ConfigurationError, ("requester-pays", "requester_pays")),
        (Answer(400, "BadDigest"), IntegrityError, ("not those that were sent", "")),
        (Answer(400, "InvalidArgument"), StorageError, ("400 (InvalidArgument)", "")),
        (Answer(403, ""), AccessDeniedError, ("GCS denied", "not in GCS's form")),
    ],
    ids=lambda value: f"{value.status} {value.code}" if isinstance(value, Answer) else "",
)
def test_a_refusal_is_explained_as_one_of_the_json_api(
    store: GCSStore, gcs_proxy: Proxy, answer: Answer, kind: type[CheckpointError], texts: tuple[str, str]
) -> None:
    upload = store.begin_upload("name")
    gcs_proxy.spoil("UploadPart", [answer] * 9)
    with pytest.raises(kind) as caught:
        store.upload_part(upload, 1, 0, [_FIRST])
    assert texts[0] in caught.value.message and texts[1] in (caught.value.hint or "")
    assert (caught.value.uri, caught.value.object_name) == (store.uri, "name")
    assert len(gcs_proxy.seen("UploadPart")) == 1
    assert pickle.loads(pickle.dumps(caught.value)).message == caught.value.message


@pytest.mark.parametrize("code", ["InternalError", "SlowDown", "ServiceUnavailable"])
def test_an_error_in_an_answer_of_status_200_is_retried(store: GCSStore, gcs_proxy: Proxy, code: str) -> None:
    upload, parts = sent(store)
    gcs_proxy.spoil("CompleteMultipartUpload", [Answer(200, code)])
    assert store.complete_upload(upload, parts).size == len(_DATA)
    assert len(gcs_proxy.seen("CompleteMultipartUpload")) == 2


def test_a_part_below_the_least_size_is_refused_by_name(store: GCSStore) -> None:
    upload = store.begin_upload("name")
    parts = [
        store.upload_part(upload, number, offset, [memoryview(b"data")])
        for number, offset in ((1, 0), (2, 4))
    ]
    with pytest.raises(StorageError, match="EntityTooSmall"):
        store.complete_upload(upload, parts)
    assert list(store.pending_uploads()) and not store.holds("name")


def test_a_gone_upload_takes_no_parts(store: GCSStore) -> None:
    upload, parts = sent(store)
    store.complete_upload(upload, parts)
    with pytest.raises(StorageError, match="was completed or aborted") as caught:
        store.upload_part(upload, 1, 0, [_FIRST])
    assert not isinstance(caught.value, ObjectNotFoundError)
    store.abort_upload(upload)


def test_an_account_that_may_not_list_uploads_saves_even_so(
    gcs: GCSServer, bucket: str, monkeypatch: pytest.MonkeyPatch, open_gcs: Opened
) -> None:
    for name in ("is_google", "serves_xml"):
        monkeypatch.setattr(gcs_client, name, lambda _: True)
    gcs.deny(bucket, "storage.multipartUploads.list")
    uri, store = f"gs://{bucket}/run", open_gcs(gcs.endpoint, bucket)
    with pytest.raises(UnsupportedError) as caught:
        list(store.pending_uploads())
    assert caught.value.hint is not None and "storage.multipartUploads.list" in caught.value.hint
    writer = cloudckpt.StorageWriter(f"{uri}/step-0000000001", endpoint_url=gcs.endpoint)
    dcp.save({"t": torch.arange(1000)}, storage_writer=writer, no_dist=True)
    assert stale_attempts.remove_dead(store, "step-0000000001") == []
    collected = collect_garbage(uri, older_than=0, endpoint_url=gcs.endpoint)
    assert any("may not list multipart uploads" in one for one in collected.skipped)
    gcs.deny(bucket)


# Listings


@pytest.fixture
def pages(store: GCSStore) -> list[Upload]:
    return [store.begin_upload(name) for name in ("a", "a", "b", "folder/c")]


def _page(*uploads: Upload, following: str = "") -> RawAnswer:
    told = "".join(
        f"<Upload><Key>run/{one.name}</Key><UploadId>{one.upload_id}</UploadId></Upload>" for one in uploads
    )
    document = (
        "<ListMultipartUploadsResult><Bucket>b</Bucket>"
        f"<IsTruncated>{'true' if following else 'false'}</IsTruncated>"
        f"<NextKeyMarker>{following}</NextKeyMarker>{told}</ListMultipartUploadsResult>"
    )
    return _answered(document.encode())


def _answered(document: bytes) -> RawAnswer:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: {len(document)}\r\n\r\n"
    return RawAnswer(head.encode() + document)


def test_uploads_are_listed_in_pages(store: GCSStore, gcs_proxy: Proxy, pages: list[Upload]) -> None:
    gcs_proxy.forget()
    gcs_proxy.spoil("ListMultipartUploads", [_page(*pages[:2], following="run/a"), _page(*pages[2:])])
    assert [one.upload for one in store.pending_uploads()] == pages
    assert "key-marker=run%2Fa" in gcs_proxy.all()[1].target


@pytest.mark.parametrize("second", ["run/a", ""], ids=["the same", "none"])
def test_a_page_that_leads_nowhere_is_an_error(
    store: GCSStore, gcs_proxy: Proxy, pages: list[Upload], second: str
) -> None:
    truncated = _answered(
        b"<ListMultipartUploadsResult><Bucket>b</Bucket><IsTruncated>true</IsTruncated></ListMultipartUploadsResult>"
    )
    gcs_proxy.spoil(
        "ListMultipartUploads", itertools.repeat(_page(*pages[:2], following=second) if second else truncated)
    )
    with pytest.raises(StorageError, match="begins where this one did") as caught:
        list(store.pending_uploads())
    assert caught.value.uri == store.uri


# Documents that are not GCS's, or hostile

_BOMB = (
    b'<?xml version="1.0"?><!DOCTYPE r [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    b"<InitiateMultipartUploadResult><UploadId>&b;</UploadId></InitiateMultipartUploadResult>"
)
_FILE = (
    b'<?xml version="1.0"?><!DOCTYPE r [<!ENTITY a SYSTEM "file:///etc/hostname">]>'
    b"<InitiateMultipartUploadResult><UploadId>&a;</UploadId></InitiateMultipartUploadResult>"
)
_HOSTILE: Mapping[str, bytes] = {
    "entities": _BOMB,
    "a file": _FILE,
    "a foreign declaration": b'<!DOCTYPE r SYSTEM "http://127.0.0.1:1/x"><InitiateMultipartUploadResult/>',
    "no XML": b"hello",
    "nothing": b"",
    "cut off": b"<InitiateMultipartUploadResult><UploadId>x",
    "another root": b"<ListBucketResult><UploadId>x</UploadId></ListBucketResult>",
    "no ID": b"<InitiateMultipartUploadResult></InitiateMultipartUploadResult>",
    "an unknown encoding": b'<?xml version="1.0" encoding="x-none"?><InitiateMultipartUploadResult/>',
    "bytes that are no text": b"<InitiateMultipartUploadResult>\xff\xfe</InitiateMultipartUploadResult>",
    "too much": b"<InitiateMultipartUploadResult>" + b" " * (2 << 20),
}


@pytest.mark.parametrize("document", _HOSTILE.values(), ids=_HOSTILE)
def test_a_document_that_is_not_gcss_is_named(store: GCSStore, gcs_proxy: Proxy, document: bytes) -> None:
    gcs_proxy.spoil("CreateMultipartUpload", [_answered(document)])
    with pytest.raises(StorageError, match="does not support GCS's XML API in full") as caught:
        store.begin_upload("name")
    assert gcs_proxy.endpoint in caught.value.message and "endpoint_url" in (caught.value.hint or "")


@pytest.mark.parametrize("document", [_BOMB, _FILE])
def test_a_declaration_of_entities_is_not_parsed(document: bytes) -> None:
    assert gcs_xml.parsed(document) is None
    assert gcs_xml.error_of(document.replace(b"InitiateMultipartUploadResult", b"Error")) is None


def test_an_answer_without_an_etag_is_named(store: GCSStore, gcs_proxy: Proxy) -> None:
    upload = store.begin_upload("name")
    gcs_proxy.spoil("UploadPart", [DropHeaders(["etag"])])
    with pytest.raises(StorageError, match="without the ETag of a part"):
        store.upload_part(upload, 1, 0, [_FIRST])


def test_a_date_that_is_none_is_left_out(store: GCSStore, gcs_proxy: Proxy) -> None:
    upload = store.begin_upload("name")
    (before,) = store.pending_uploads()
    assert before.started is not None
    gcs_proxy.spoil("ListMultipartUploads", [EditAnswer(b"<Initiated>2", b"<Initiated>x")])
    (after,) = store.pending_uploads()
    assert (after.upload, after.started) == (upload, None)


# A save


def test_the_uploads_of_a_killed_save_are_collected(gcs: GCSServer, bucket: str, open_gcs: Opened) -> None:
    uri = f"gs://{bucket}/run"
    writer = cloudckpt.StorageWriter(f"{uri}/step", endpoint_url=gcs.endpoint)
    dcp.save({"t": torch.arange(1000)}, storage_writer=writer, no_dist=True)
    store = open_gcs(gcs.endpoint, bucket)
    left = store.begin_upload(f"step/__0_0.{'0' * 32}.distcp")
    store.upload_part(left, 1, 0, [_FIRST])
    collected = collect_garbage(uri, older_than=0, endpoint_url=gcs.endpoint)
    assert list(collected.uploads) == [left.name]
    assert list(store.pending_uploads()) == []
    loaded = {"t": torch.zeros(1000, dtype=torch.int64)}
    reader = cloudckpt.StorageReader(f"{uri}/step", endpoint_url=gcs.endpoint)
    dcp.load(loaded, storage_reader=reader, no_dist=True)
    assert torch.equal(loaded["t"], torch.arange(1000))
