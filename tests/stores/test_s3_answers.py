"""What the S3 store makes of what a server answers: what is asked again, how often, and what it means."""

from __future__ import annotations

import itertools

import pytest

from cloudckpt.backends.errors import (
    AccessDeniedError,
    IntegrityError,
    ObjectNotFoundError,
    StorageError,
)
from cloudckpt.backends.stores.s3 import S3Store
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
    Proxy,
)

_CONFLICT = Answer(409, "ConditionalRequestConflict")


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
    assert len(proxy.seen(operation)) == 1


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


@pytest.mark.parametrize("status", [400, 501])
def test_a_server_that_refuses_checksums_is_sent_none(proxy: Proxy, bucket: Bucket, status: int) -> None:
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
def test_a_conflict_with_another_writer_is_tried_again(
    store: S3Store, proxy: Proxy, bucket: Bucket, operation: str
) -> None:
    proxy.spoil(operation, [_CONFLICT] * 2)
    OPERATIONS[operation](store)
    assert len(proxy.seen(operation)) == 3
    assert bucket.found() == b"data"


@pytest.mark.parametrize("operation", ["PutObject", "CompleteMultipartUpload"])
def test_a_conflict_that_stays_is_a_storage_error(
    store: S3Store, proxy: Proxy, bucket: Bucket, operation: str
) -> None:
    proxy.spoil(operation, itertools.repeat(_CONFLICT))
    with pytest.raises(StorageError, match="ConditionalRequestConflict") as caught:
        OPERATIONS[operation](store)
    assert type(caught.value) is StorageError
    assert len(proxy.seen(operation)) == 4
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
