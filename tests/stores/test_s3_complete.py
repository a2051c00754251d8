"""Completing an upload to S3: never a success that did not happen, nor a failure that did."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.endpoint import served
from bench.growth import reached
from cloudckpt.backends.checksums import ALGORITHMS
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import (
    IntegrityError,
    StorageError,
    UnansweredError,
)
from cloudckpt.backends.stores.base import Part, Upload
from cloudckpt.backends.stores.s3.store import S3Store
from cloudckpt.backends.stores.throttle import ON_BEHALF
from support.buckets import (
    PART,
    Bucket,
    Stores,
    open_in,
    random_bytes,
    send,
)
from support.proxy import (
    Answer,
    CutRequest,
    EditAnswer,
    FlipBit,
    LoseAnswer,
    Proxy,
    proxied,
)
from support.servers import S3Server

_OTHER_TAG = EditAnswer(b"-1", b"-9")
"""Have the entity tag in the answer to a completion say nothing of the one part."""
_CONFLICT = Answer(409, "ConditionalRequestConflict")


@pytest.fixture
def store(stores: Stores) -> S3Store:
    return stores(retries=1)


@pytest.mark.parametrize(
    "spoilings", [[LoseAnswer()], [LoseAnswer(), _CONFLICT]], ids=["lost", "lost, then a conflict"]
)
def test_completing_succeeds_though_the_answer_was_lost(
    s3_server: S3Server, spoilings: Sequence[Answer | LoseAnswer]
) -> None:
    bucket, data = Bucket.new(s3_server), random_bytes(PART + 7)
    with proxied(s3_server.endpoint) as proxy, open_in(proxy, bucket, retries=2) as store:
        upload = store.begin_upload("name")
        parts = [
            store.upload_part(upload, 1, 0, [memoryview(data)[:PART]]),
            store.upload_part(upload, 2, PART, [memoryview(data)[PART:]]),
        ]
        proxy.spoil("CompleteMultipartUpload", spoilings)
        assert store.complete_upload(upload, parts).size == len(data)
        assert len(proxy.seen("CompleteMultipartUpload")) == len(spoilings) + 1
    assert bucket.found() == data


def test_a_failure_to_complete_that_comes_with_status_200_is_no_success(
    store: S3Store, proxy: Proxy, bucket: Bucket
) -> None:
    proxy.spoil("CompleteMultipartUpload", [Answer(200, "InternalError")])
    send(store, b"data")  # S3 answers before it is done, and this was tried again
    assert bucket.found() == b"data"
    bucket.clear()
    proxy.spoil("CompleteMultipartUpload", itertools.repeat(Answer(200, "InternalError")))
    with pytest.raises(StorageError, match="InternalError"):
        send(store, b"data")
    assert bucket.found() is None


def test_completing_what_is_gone_fails_although_an_older_object_has_the_name(
    s3_server_named: Callable[[str], S3Server],
) -> None:
    server = s3_server_named("ministack")
    bucket = Bucket.new(server)
    bucket.hold(b"older")
    with proxied(server.endpoint) as proxy, open_in(proxy, bucket) as store:
        upload = store.begin_upload("name")
        part = store.upload_part(upload, 1, 0, [memoryview(b"newer")])
        store.abort_upload(upload)
        with pytest.raises(StorageError, match="does not exist"):
            store.complete_upload(upload, [part])
    assert bucket.found() == b"older"


@pytest.mark.parametrize("checksum", ["crc64nvme", "crc32c"])
def test_a_part_that_changes_on_its_way_is_refused_and_nothing_visible(
    s3_server_named: Callable[[str], S3Server], checksum: str
) -> None:
    server = s3_server_named("ministack")  # alone of the three it looks at a part's checksum
    bucket = Bucket.new(server)
    with proxied(server.endpoint) as proxy, open_in(proxy, bucket, checksum=checksum) as store:
        upload = store.begin_upload("name")
        proxy.spoil("UploadPart", [FlipBit()])
        with pytest.raises(IntegrityError) as caught:
            store.upload_part(upload, 1, 0, [memoryview(random_bytes(PART))])
        assert (caught.value.uri, caught.value.object_name) == (store.uri, "name")
        assert len(proxy.seen("UploadPart")) == 1
        assert store.list().objects == ()
        assert not bucket.has_parts(upload)
    assert bucket.found() is None


def test_a_completed_object_of_another_size_is_deleted_and_an_integrity_error(
    store: S3Store, proxy: Proxy, bucket: Bucket
) -> None:
    upload = store.begin_upload("name")
    part = store.upload_part(upload, 1, 0, [memoryview(b"data")])
    proxy.spoil("CompleteMultipartUpload", [_OTHER_TAG])
    proxy.spoil("HeadObject", [Answer(200, "", {"ETag": '"etag"', "x-amz-request-id": "1"})])
    with pytest.raises(IntegrityError, match="0 bytes where its parts have 4"):
        store.complete_upload(upload, [part])
    assert bucket.found() is None


@pytest.mark.parametrize("proven", [True, False])
def test_a_completed_object_is_asked_for_its_size_unless_the_entity_tag_is_that_of_the_parts(
    store: S3Store, proxy: Proxy, bucket: Bucket, proven: bool
) -> None:
    send(store, b"first")
    looks = len(proxy.seen("HeadObject"))
    assert looks <= 1, "a server shows once that it names the version of the object"
    proxy.spoil("CompleteMultipartUpload", [None if proven else _OTHER_TAG])
    send(store, b"data")
    assert bucket.found() == b"data"
    assert len(proxy.seen("HeadObject")) == looks + (0 if proven else 1)


def test_a_completion_that_may_have_been_carried_out_is_unanswered(
    store: S3Store, proxy: Proxy, bucket: Bucket
) -> None:
    proxy.spoil("CompleteMultipartUpload", [CutRequest(0), Answer(503, "SlowDown")])
    with pytest.raises(UnansweredError, match="the answer to one of 2 tries was lost"):
        send(store, b"data")
    assert bucket.found() is None


def _whole(algorithm: str, value: bytes) -> EditAnswer:
    """Have the answer to a completion carry this checksum of the whole object."""
    name = f"Checksum{algorithm.upper()}".encode()
    end = b"</CompleteMultipartUploadResult>"
    said = b"<%s>%s</%s><ChecksumType>FULL_OBJECT</ChecksumType>" % (name, value, name)
    return EditAnswer(end, said + end)


@pytest.mark.parametrize("algorithm", ["crc64nvme", "crc32c"])
def test_a_store_that_has_other_bytes_than_were_sent_is_found_out_and_the_object_deleted(
    stores: Stores, proxy: Proxy, bucket: Bucket, algorithm: str
) -> None:
    data = random_bytes(PART + 7)
    of = ALGORITHMS[algorithm]
    right, wrong = (of.text(of.of(sent)).partition(":")[2].encode() for sent in (data, data[1:]))
    store = stores(checksum=algorithm)

    def complete() -> None:
        upload = store.begin_upload("name")
        view = memoryview(data)
        parts = [store.upload_part(upload, 2, PART, [view[PART:]])]
        parts += [store.upload_part(upload, 1, 0, [view[:PART]])]
        store.complete_upload(upload, parts)

    proxy.spoil("CompleteMultipartUpload", [_whole(algorithm, right)])
    complete()
    assert bucket.found() == data
    proxy.spoil("CompleteMultipartUpload", [_whole(algorithm, wrong)])
    with pytest.raises(IntegrityError, match="of the whole object where its parts make") as caught:
        complete()
    assert (caught.value.uri, caught.value.object_name) == (store.uri, "name")
    assert bucket.found() is None


def test_many_ranks_uploads_are_completed_at_once_on_connections_that_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The coordinator has more requests in flight than a rank: see ``commit.at_once``."""
    with served() as endpoint:
        target = Target.parse(f"s3://{endpoint.server.new_bucket()}/run", **reached(endpoint.server))
        with S3Store(target) as store, ThreadPoolExecutor(ON_BEHALF) as pool:
            uploads = [store.begin_upload(f"name-{at}") for at in range(ON_BEHALF)]
            parts = [store.upload_part(one, 1, 0, [memoryview(b"abc")]) for one in uploads]
            together = threading.Barrier(ON_BEHALF)

            def complete(upload: Upload, part: Part) -> int:
                together.wait(60)
                return store.complete_upload(upload, [part], confirm=False).size

            assert set(pool.map(complete, uploads, parts)) == {3}
    assert "pool is full" not in caplog.text
