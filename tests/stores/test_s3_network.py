"""The S3 store when connections break, stall or change what they carry, one request at a time."""

from __future__ import annotations

import contextlib
import itertools
import pickle
from collections.abc import Callable, Iterator

import pytest

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import (
    CheckpointError,
    PreconditionFailedError,
    StorageError,
    UnansweredError,
)
from cloudckpt.backends.stores.base import Create, Overwrite
from cloudckpt.backends.stores.retry import Judgement
from cloudckpt.backends.stores.s3 import requests as s3_requests
from cloudckpt.backends.stores.s3 import verdict as s3_verdict
from cloudckpt.backends.stores.s3.store import S3Store
from support.buckets import (
    OPERATIONS,
    PART,
    Bucket,
    Stores,
    every_operation,
    open_in,
    random_bytes,
    read,
    send,
)
from support.proxy import (
    Answer,
    CutAnswer,
    CutRequest,
    Delay,
    HalveAnswer,
    LoseAnswer,
    Proxy,
    Spoiling,
    Stall,
    StallAnswer,
    proxied,
)
from support.servers import S3Server, unused_port


@pytest.fixture
def store(stores: Stores) -> S3Store:
    return stores(retries=1)


@pytest.mark.parametrize("after", [0, 1, 700_000, (1 << 20) - 1])
def test_a_body_that_breaks_off_is_asked_for_again(
    store: S3Store, proxy: Proxy, bucket: Bucket, after: int
) -> None:
    data = bucket.hold(random_bytes(1 << 20))
    proxy.spoil("GetObject", [CutAnswer(after)])
    assert read(store, len(data)) == data
    proxy.spoil("GetObject", [CutAnswer(after)])
    assert store.get("name")[0] == data
    assert len(proxy.seen("GetObject")) == 4


def test_a_body_that_stalls_is_asked_for_again(stores: Stores, proxy: Proxy, bucket: Bucket) -> None:
    data = bucket.hold(random_bytes(1 << 20))
    proxy.spoil("GetObject", [StallAnswer(1000), None, StallAnswer(1000)])
    store = stores(timeout=1.0)
    assert read(store, len(data)) == data
    assert store.get("name")[0] == data
    assert len(proxy.seen("GetObject")) == 4


def test_buffers_hold_one_version_when_the_object_changes_under_a_body_that_breaks_off(
    store: S3Store, proxy: Proxy, bucket: Bucket
) -> None:
    bucket.hold(b"a" * 1000)

    def replace_it() -> Iterator[CutAnswer]:
        yield CutAnswer(500)
        bucket.hold(b"b" * 1000)

    proxy.spoil("GetObject", replace_it())
    assert read(store, 1000) == b"b" * 1000


@pytest.mark.parametrize("retries", [0, 2])
def test_a_body_that_breaks_off_each_time_is_given_up(
    stores: Stores, proxy: Proxy, bucket: Bucket, retries: int
) -> None:
    bucket.hold(random_bytes(1000))
    proxy.spoil("GetObject", itertools.repeat(CutAnswer(999)))
    store = stores(retries=retries)
    asks: list[Callable[[], object]] = [lambda: read(store, 1000), lambda: store.get("name")]
    for number, ask in enumerate(asks, 1):
        with pytest.raises(StorageError, match="broke off") as caught:
            ask()
        assert (caught.value.uri, caught.value.object_name) == (store.uri, "name")
        assert len(proxy.seen("GetObject")) == number * (retries + 1)


@pytest.mark.parametrize("after", [0, 3_000_000])
def test_a_part_cut_off_on_its_way_is_sent_again_whole(
    store: S3Store, proxy: Proxy, bucket: Bucket, after: int
) -> None:
    data = random_bytes(PART + 1)
    proxy.spoil("UploadPart", [CutRequest(after)])
    send(store, data)
    assert [len(request.body) for request in proxy.seen("UploadPart")] == [after, len(data)]
    assert bucket.found() == data


@pytest.mark.parametrize("spoiling", [Answer(503, "SlowDown"), LoseAnswer()])
def test_a_part_that_was_read_already_is_sent_again_whole(
    store: S3Store, proxy: Proxy, bucket: Bucket, spoiling: Answer | LoseAnswer
) -> None:
    data = random_bytes(PART + 1)
    proxy.spoil("UploadPart", [spoiling])
    send(store, data)
    assert [request.body == data for request in proxy.seen("UploadPart")] == [True, True]
    assert bucket.found() == data


_UNANSWERED = [
    (operation, spoiling) for operation in sorted(OPERATIONS) for spoiling in (Stall(), LoseAnswer())
]


@pytest.mark.parametrize(("operation", "spoiling"), _UNANSWERED)
def test_a_request_without_an_answer_is_unanswered(
    stores: Stores, proxy: Proxy, bucket: Bucket, operation: str, spoiling: Stall | LoseAnswer
) -> None:
    bucket.hold(b"data")
    proxy.spoil(operation, itertools.repeat(spoiling))
    # Long enough for the requests before, which a busy machine answers late; only a stall waits for its end.
    store = stores(retries=0, timeout=1.0 if isinstance(spoiling, Stall) else 20.0)
    with pytest.raises(UnansweredError) as caught:
        OPERATIONS[operation](store)
    assert caught.value.uri == store.uri
    assert len(proxy.seen(operation)) == 1


def test_a_conditional_put_whose_answer_was_lost_is_a_lost_condition(
    store: S3Store, proxy: Proxy, bucket: Bucket
) -> None:
    assert store.capabilities.conditional_create  # asks now, so that the put below is the next one
    proxy.spoil("PutObject", [LoseAnswer()])
    with pytest.raises(PreconditionFailedError):
        store.put("name", b"data", Create())
    assert bucket.found() == b"data"  # by which the caller tells that it was its own


def test_a_put_with_one_try_unanswered_is_unanswered_though_a_later_try_was_refused(
    stores: Stores, proxy: Proxy, bucket: Bucket
) -> None:
    """The first try may still arrive: nothing that it would name may be taken away."""
    store = stores(retries=1)
    proxy.spoil("PutObject", [CutRequest(0), Answer(503, "SlowDown")])
    with pytest.raises(UnansweredError):
        store.put("name", b"data", Overwrite())
    assert bucket.found() is None


def test_a_put_that_was_refused_each_time_is_over(stores: Stores, proxy: Proxy, bucket: Bucket) -> None:
    store = stores(retries=1)
    proxy.spoil("PutObject", itertools.repeat(Answer(503, "SlowDown")))
    with pytest.raises(StorageError) as caught:
        store.put("name", b"data", Overwrite())
    assert not isinstance(caught.value, UnansweredError)
    assert bucket.found() is None


@pytest.mark.parametrize("status", [502, 504])
def test_a_put_that_a_gateway_gave_up_is_unanswered(
    store: S3Store, proxy: Proxy, bucket: Bucket, status: int
) -> None:
    proxy.spoil("PutObject", [Answer(status), Answer(503, "SlowDown")])
    with pytest.raises(UnansweredError):
        store.put("name", b"data", Overwrite())


@every_operation
@pytest.mark.parametrize("spoiling", [HalveAnswer(), LoseAnswer(), CutRequest(0), Delay(0.1)])
def test_an_answer_that_is_broken_lost_or_late_once_is_no_error(
    store: S3Store, proxy: Proxy, bucket: Bucket, operation: str, spoiling: Spoiling
) -> None:
    bucket.hold(b"data")
    proxy.spoil(operation, [spoiling])
    OPERATIONS[operation](store)


def test_an_upload_that_was_begun_twice_is_pending_once(s3_server: S3Server) -> None:
    """The one begun first would stay for ever: only the answer that was lost had its id."""
    bucket = Bucket.new(s3_server)
    with proxied(s3_server.endpoint) as proxy, open_in(proxy, bucket) as store:
        others = [store.begin_upload(name) for name in ("name-2", "other")]
        proxy.spoil("CreateMultipartUpload", [LoseAnswer()])
        upload = store.begin_upload("name")
        assert len(proxy.seen("CreateMultipartUpload")) == 4
        pending = [pending.upload for pending in store.pending_uploads()]
        assert sorted(pending, key=lambda one: one.name) == sorted(
            [upload, *others], key=lambda one: one.name
        )
        part = store.upload_part(upload, 1, 0, [memoryview(b"data")])
        assert store.complete_upload(upload, [part]).size == 4


def test_an_upload_begun_twice_is_no_error_where_uploads_can_not_be_listed(
    store: S3Store, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.spoil("CreateMultipartUpload", [LoseAnswer()])
    proxy.spoil("ListMultipartUploads", itertools.repeat(Answer(403, "AccessDenied")))
    assert store.begin_upload("name").upload_id
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a second upload of name may be pending" in caplog.text
    assert "gc" not in caplog.text


def _judging(monkeypatch: pytest.MonkeyPatch, note: Callable[[int], object]) -> None:
    """Call ``note`` with the number of every failure, before what it means is judged."""
    numbers = itertools.count(1)

    def judge(error: Exception) -> Judgement:
        note(next(numbers))
        return s3_verdict.judge(error)

    monkeypatch.setattr(s3_requests, "judge", judge)


def test_where_nothing_has_ever_answered_three_tries_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers: list[int] = []
    _judging(monkeypatch, numbers.append)
    given = {"key": "test", "secret": "testtest"}
    endpoint = f"http://127.0.0.1:{unused_port()}"
    store = S3Store(Target.parse("s3://bucket", endpoint_url=endpoint, storage_options=given))
    with pytest.raises(StorageError, match="cannot reach"):
        store.stat("name")
    assert numbers == [1, 2, 3]


def test_a_server_that_restarts_is_waited_for(
    moto: S3Server, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        with proxied(moto.endpoint) as proxy:
            store = stack.enter_context(open_in(proxy, bucket, retries=10))
            store.put("name", b"data", Overwrite())
            store.close()  # a thread of the proxy would serve a kept connection on
        port = int(proxy.endpoint.rpartition(":")[2])

        def restart(number: int) -> None:
            if number == 4:
                stack.enter_context(proxied(moto.endpoint, port=port))

        _judging(monkeypatch, restart)
        assert store.get("name")[0] == b"data"


def test_an_error_that_a_broken_network_made_keeps_its_fields_in_a_pickle(
    store: S3Store, proxy: Proxy, bucket: Bucket
) -> None:
    bucket.hold(b"data")
    proxy.spoil("GetObject", itertools.repeat(CutAnswer(1)))
    with pytest.raises(CheckpointError) as caught:
        store.get("name")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy)) == (type(caught.value), str(caught.value))
