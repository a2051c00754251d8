"""What the S3 store makes of what a server answers: what is asked again, how often, and what it means."""

from __future__ import annotations

import itertools

import pytest

from cloudckpt.backends.errors import (
    AccessDeniedError,
    ConfigurationError,
    IntegrityError,
    ObjectNotFoundError,
    StorageError,
)
from cloudckpt.backends.stores.s3 import capabilities as s3_capabilities
from cloudckpt.backends.stores.s3 import requests as s3_requests
from cloudckpt.backends.stores.s3.store import S3Store
from support import dialects
from support.buckets import (
    OPERATIONS,
    Bucket,
    Stores,
    every_operation,
    open_in,
    random_bytes,
    send,
)
from support.proxy import (
    Answer,
    EditAnswer,
    Proxy,
)

_FINAL = {
    400: "InvalidRequest",
    401: "Unauthorized",
    403: "AccessDenied",
    404: "NoSuchKey",
    405: "MethodNotAllowed",
    409: "InvalidBucketState",
    412: "PreconditionFailed",
    501: "NotImplemented",
}
"""Codes by status."""
_PASSING = [
    Answer(503, "SlowDown"),
    Answer(503, "ServiceUnavailable"),
    Answer(429, "TooManyRequests"),
    Answer(500, "InternalError"),
    Answer(502),
    Answer(504),
    Answer(400, "RequestTimeout"),
    Answer(408, "RequestTimeout"),
]


@pytest.fixture
def store(stores: Stores) -> S3Store:
    return stores(retries=1)


@every_operation
def test_what_is_denied_is_asked_for_once(
    store: S3Store, proxy: Proxy, bucket: Bucket, operation: str
) -> None:
    bucket.hold(b"data")
    proxy.spoil(operation, itertools.repeat(Answer(403, "AccessDenied")))
    with pytest.raises(AccessDeniedError) as caught:
        OPERATIONS[operation](store)
    assert caught.value.hint
    assert len(proxy.seen(operation)) == _asked(operation, 403)


@every_operation
@pytest.mark.parametrize("status", sorted(_FINAL))
def test_a_final_answer_is_asked_for_once(
    stores: Stores, proxy: Proxy, bucket: Bucket, operation: str, status: int
) -> None:
    bucket.hold(b"data")
    # With `auto` an upload that is refused is declared once more, without its checksum.
    store = stores(retries=3, checksum="none")
    proxy.spoil(operation, itertools.repeat(Answer(status, _FINAL[status])))
    if operation == "DeleteObjects":  # after which single deletions may be tried, and refused as well
        answer = Answer(status, "NoSuchBucket" if status == 404 else _FINAL[status])
        proxy.spoil(operation, itertools.repeat(answer))
        proxy.spoil("DeleteObject", itertools.repeat(answer))
    with pytest.raises(StorageError):
        OPERATIONS[operation](store)
    assert len(proxy.seen(operation)) == _asked(operation, status)


def _asked(operation: str, status: int) -> int:
    """Return how many requests an answer with this status takes.

    botocore takes a 400 to a HEAD for one from another region, and looks there. A denied read is repeated
    once if the object is listed then, because it may have been put in between.
    """
    again = {("HeadObject", 400), ("HeadObject", 403), ("GetObject", 403)}
    return 2 if (operation, status) in again else 1


@every_operation
def test_credentials_that_were_given_and_have_expired_are_denied_at_once(
    stores: Stores, proxy: Proxy, bucket: Bucket, operation: str
) -> None:
    bucket.hold(b"data")
    proxy.spoil(operation, itertools.repeat(Answer(400, "ExpiredToken")))
    with pytest.raises(StorageError) as caught:
        OPERATIONS[operation](stores(retries=3))
    if operation != "HeadObject":  # whose answer has no body to say so
        assert isinstance(caught.value, AccessDeniedError)
    assert len(proxy.seen(operation)) == _asked(operation, 400)


@pytest.mark.parametrize("answer", _PASSING, ids=lambda answer: f"{answer.status}{answer.code}")
@pytest.mark.parametrize("operation", ["GetObject", "ListObjectsV2", "UploadPart"])
def test_what_may_pass_is_asked_again(
    store: S3Store, proxy: Proxy, bucket: Bucket, operation: str, answer: Answer
) -> None:
    bucket.hold(b"data")
    proxy.spoil(operation, [answer])
    OPERATIONS[operation](store)
    assert len(proxy.seen(operation)) == 2


@pytest.mark.parametrize("operation", ["GetObject", "HeadObject"])
def test_what_is_not_there_is_asked_for_once(store: S3Store, proxy: Proxy, operation: str) -> None:
    with pytest.raises(ObjectNotFoundError):
        OPERATIONS[operation](store)
    assert proxy.count == 1


@pytest.mark.parametrize(("offset", "length"), [(0, 5), (4, 1)])
def test_a_range_beyond_the_end_is_asked_for_once(
    store: S3Store, proxy: Proxy, bucket: Bucket, offset: int, length: int
) -> None:
    bucket.hold(b"data")
    with pytest.raises(IntegrityError):
        store.read_into("name", offset, [memoryview(bytearray(length))])
    assert proxy.count == 1


@every_operation
def test_a_busy_server_is_asked_again(store: S3Store, proxy: Proxy, bucket: Bucket, operation: str) -> None:
    bucket.hold(b"data")
    proxy.spoil(operation, [Answer(503, "SlowDown")])
    OPERATIONS[operation](store)
    assert len(proxy.seen(operation)) == 2


@every_operation
@pytest.mark.parametrize("retries", [0, 1])
def test_a_server_that_stays_busy_is_asked_no_more_often_than_the_retries_allow(
    stores: Stores, proxy: Proxy, bucket: Bucket, operation: str, retries: int
) -> None:
    bucket.hold(b"data")
    proxy.spoil(operation, itertools.repeat(Answer(503, "SlowDown")))
    with pytest.raises(StorageError, match="503"):
        OPERATIONS[operation](stores(retries=retries))
    assert len(proxy.seen(operation)) == retries + 1


@pytest.fixture
def unknown() -> None:
    """Have no server been probed yet."""
    s3_capabilities.forget_servers()


@pytest.mark.usefixtures("unknown")
def test_a_server_that_does_not_look_at_checksums_is_sent_none(proxy: Proxy, bucket: Bucket) -> None:
    data = random_bytes(1000)
    with open_in(proxy, bucket) as store:
        assert store.part_checksum is None
        send(store, data)
        asked = len(proxy.seen("PutObject"))
        send(store, data)
        assert (asked, len(proxy.seen("PutObject"))) == (6, 6), "once is enough"
    requests = (*proxy.seen("CreateMultipartUpload"), *proxy.seen("UploadPart"))
    assert not [name for request in requests for name in request.headers if "checksum" in name]
    assert bucket.found() == data


@pytest.mark.usefixtures("unknown")
def test_a_server_that_looks_at_checksums_is_sent_them(proxy: Proxy, bucket: Bucket) -> None:
    proxy.rule(dialects.verifying("crc64nvme"))
    with open_in(proxy, bucket) as store:
        assert store.part_checksum == "crc64nvme"
        send(store, b"data")
    (part,) = proxy.seen("UploadPart")
    assert "x-amz-checksum-crc64nvme" in part.headers


@pytest.mark.usefixtures("unknown")
@pytest.mark.parametrize("status", [400, 501])
def test_a_server_that_refuses_checksums_is_sent_none(proxy: Proxy, bucket: Bucket, status: int) -> None:
    proxy.rule(dialects.verifying("crc64nvme"))
    proxy.spoil("CreateMultipartUpload", [Answer(status, "InvalidArgument")])
    data = random_bytes(1000)
    with open_in(proxy, bucket) as store:
        send(store, data)
        send(store, data)
    declared = [
        "x-amz-checksum-algorithm" in request.headers for request in proxy.seen("CreateMultipartUpload")
    ]
    assert declared == [True, False, False]
    assert not [
        name
        for request in (*proxy.seen("UploadPart"), *proxy.seen("CompleteMultipartUpload"))
        for name in request.headers
        if name.startswith("x-amz-checksum")
    ]
    assert bucket.found() == data


def test_a_checksum_asked_for_by_name_is_never_left_out(stores: Stores, proxy: Proxy) -> None:
    proxy.spoil("CreateMultipartUpload", itertools.repeat(Answer(501, "NotImplemented")))
    with pytest.raises(StorageError, match="501"):
        stores(checksum="crc32c").begin_upload("name")
    requests = proxy.seen("CreateMultipartUpload")
    assert {request.headers.get("x-amz-checksum-algorithm") for request in requests} == {"CRC32C"}


@pytest.mark.parametrize("operation", ["PutObject", "CompleteMultipartUpload"])
@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "OperationAborted"])
def test_a_conflict_with_another_writer_is_tried_again(
    stores: Stores, proxy: Proxy, bucket: Bucket, operation: str, code: str
) -> None:
    proxy.spoil(operation, [Answer(409, code)] * 2)
    OPERATIONS[operation](stores(retries=2))
    assert len(proxy.seen(operation)) == 3
    assert bucket.found() == b"data"


@pytest.mark.parametrize("operation", ["PutObject", "CompleteMultipartUpload"])
def test_a_conflict_that_stays_is_a_storage_error(
    store: S3Store, proxy: Proxy, bucket: Bucket, operation: str
) -> None:
    proxy.spoil(operation, itertools.repeat(Answer(409, "ConditionalRequestConflict")))
    with pytest.raises(StorageError, match="ConditionalRequestConflict") as caught:
        OPERATIONS[operation](store)
    assert type(caught.value) is StorageError
    assert len(proxy.seen(operation)) == 2
    assert bucket.found() is None


@every_operation
def test_a_bucket_in_another_region_is_said_to_be_there(
    store: S3Store, proxy: Proxy, bucket: Bucket, operation: str
) -> None:
    bucket.hold(b"data")
    elsewhere = Answer(301, "PermanentRedirect", {"x-amz-bucket-region": "eu-north-1"})
    proxy.spoil(operation, itertools.repeat(elsewhere))
    with pytest.raises(StorageError, match="in another region") as caught:
        OPERATIONS[operation](store)
    assert caught.value.hint == "Set the option region to eu-north-1"


@pytest.mark.parametrize("operation", ["GetObject", "UploadPart", "ListObjectsV2"])
def test_a_bucket_is_followed_into_its_region_without_retries(
    stores: Stores, proxy: Proxy, bucket: Bucket, operation: str
) -> None:
    bucket.hold(b"data")
    proxy.spoil(operation, [Answer(301, "PermanentRedirect", {"x-amz-bucket-region": "eu-north-1"})])
    OPERATIONS[operation](stores(retries=0, region="eu-west-1"))
    signed = [request.headers["authorization"].split("/")[2] for request in proxy.seen(operation)]
    assert signed[-1] == "eu-north-1"


def test_objects_that_a_busy_server_did_not_delete_are_deleted_again(
    store: S3Store, proxy: Proxy, bucket: Bucket
) -> None:
    bucket.hold(b"data")
    failed = b"<Error><Key>run/name</Key><Code>SlowDown</Code><Message>later</Message></Error>"
    proxy.spoil("DeleteObjects", [EditAnswer(b"</DeleteResult>", failed + b"</DeleteResult>")] * 3)
    with pytest.raises(StorageError, match=r"an object was not deleted \(SlowDown: later\)"):
        store.delete(["name"])
    assert len(proxy.seen("DeleteObjects")) == 2
    proxy.spoil("DeleteObjects", [EditAnswer(b"</DeleteResult>", failed + b"</DeleteResult>")])
    store.delete(["name"])
    assert len(proxy.seen("DeleteObjects")) == 4


def test_retries_below_ours_are_refused(proxy: Proxy, bucket: Bucket) -> None:
    given = {"key": "test", "secret": "testtest", "config_kwargs": {"retries": {"max_attempts": 3}}}
    with (
        open_in(proxy, bucket, storage_options=given) as store,
        pytest.raises(ConfigurationError, match="Use the option retries"),
    ):
        store.stat("name")


@pytest.mark.parametrize("operation", ["UploadPart", "GetObject"])
def test_a_request_of_many_bytes_has_time_for_another_try(
    stores: Stores, proxy: Proxy, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    monkeypatch.setattr(s3_requests, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(s3_requests, "_TIMEOUTS", 0)
    monkeypatch.setattr(s3_requests, "_SLOWEST", 1 << 16)
    store = stores(retries=3)
    data = random_bytes(6 << 20)
    bucket.hold(data)

    def carry(size: int) -> None:
        if operation == "UploadPart":
            store.upload_part(store.begin_upload("name"), 1, 0, [memoryview(data)[:size]])
        else:
            store.read_into("name", 0, [memoryview(bytearray(size))])

    proxy.spoil(operation, [Answer(500, "InternalError")] * 2)
    with pytest.raises(StorageError):
        carry(10)
    carry(len(data))
    assert len(proxy.seen(operation)) == 3
