"""A 403 to a read of S3: the object is missing, or denied, or the caller may not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from cloudckpt.backends.errors import AccessDeniedError, ObjectNotFoundError, StorageError
from cloudckpt.backends.stores.base import Create, Overwrite
from cloudckpt.backends.stores.s3.store import S3Store
from support.as_aws import hides_missing
from support.buckets import Bucket, Stores
from support.iam import Statement
from support.proxy import Answer, Proxy, Request, Spoiling

READS: Mapping[str, Callable[[S3Store], object]] = {
    "get": lambda store: store.get("name"),
    "stat": lambda store: store.stat("name"),
    "read_into": lambda store: store.read_into("name", 1, [memoryview(bytearray(2))]),
}
every_read = pytest.mark.parametrize("read", READS.values(), ids=READS)
_ALLOWED: list[Statement] = [
    {"Effect": "Allow", "Action": ["s3:*Object"], "Resource": ["*"]},
    {
        "Effect": "Allow",
        "Action": ["s3:ListBucket"],
        "Resource": ["*"],
        "Condition": {"StringLike": {"s3:prefix": ["*"]}},
    },
]


@pytest.fixture
def store(stores: Stores, proxy: Proxy) -> S3Store:
    made = stores(retries=1)
    made.put("first", b"", Overwrite())  # capabilities are probed now
    proxy.forget()
    proxy.rule(hides_missing(_ALLOWED))
    return made


def operations(proxy: Proxy) -> list[str]:
    return [request.operation for request in proxy.all()]


@every_read
def test_a_missing_object_is_told_from_a_denied_one_by_one_listing(
    store: S3Store, proxy: Proxy, read: Callable[[S3Store], object]
) -> None:
    with pytest.raises(ObjectNotFoundError) as caught:
        read(store)
    assert (caught.value.object_name, caught.value.uri) == ("name", store.uri)
    assert proxy.count == 2 and operations(proxy)[1] == "ListObjectsV2"
    assert "max-keys=1" in proxy.all()[1].target


@pytest.mark.parametrize("neighbours", [("name/below",), ("name.distcp", "nam", "name!")])
@every_read
def test_a_longer_name_is_not_taken_for_the_object(
    store: S3Store, bucket: Bucket, read: Callable[[S3Store], object], neighbours: tuple[str, ...]
) -> None:
    for name in neighbours:
        store.put(name, b"data", Overwrite())
    with pytest.raises(ObjectNotFoundError):
        read(store)


@every_read
def test_an_object_that_may_not_be_read_is_denied(
    store: S3Store, proxy: Proxy, bucket: Bucket, read: Callable[[S3Store], object]
) -> None:
    bucket.hold(b"data")
    store.put("name.longer", b"data", Overwrite())
    for operation in ("GetObject", "HeadObject"):
        proxy.spoil(operation, [Answer(403, "AccessDenied")] * 9)
    with pytest.raises(AccessDeniedError) as caught:
        read(store)
    assert caught.value.hint is not None and "need s3:GetObject here" in caught.value.hint


@every_read
def test_a_denied_listing_leaves_a_denial_that_names_both_permissions(
    store: S3Store, proxy: Proxy, read: Callable[[S3Store], object]
) -> None:
    proxy.spoil("ListObjectsV2", [Answer(403, "AccessDenied")] * 9)
    with pytest.raises(AccessDeniedError) as caught:
        read(store)
    assert caught.value.hint is not None and "s3:GetObject and s3:ListBucket" in caught.value.hint
    assert proxy.count == 2


@every_read
def test_an_object_put_between_the_denial_and_the_listing_is_read(
    store: S3Store, proxy: Proxy, bucket: Bucket, read: Callable[[S3Store], object]
) -> None:
    hide = hides_missing(_ALLOWED)

    def commit(request: Request) -> Spoiling:
        if request.operation == "ListObjectsV2":
            bucket.hold(b"data")
        return hide(request)

    proxy.rule(commit)
    read(store)
    assert proxy.count == 3


@pytest.mark.parametrize("code", ["RequestTimeTooSkewed", "SignatureDoesNotMatch", "UserSuspended"])
def test_the_cause_of_a_403_to_a_head_is_that_of_the_listing(store: S3Store, proxy: Proxy, code: str) -> None:
    proxy.rule(lambda _: Answer(403, code))
    with pytest.raises(StorageError, match=code):
        store.stat("name")


@every_read
def test_a_403_that_tells_its_cause_is_followed_by_no_listing(
    store: S3Store, proxy: Proxy, read: Callable[[S3Store], object]
) -> None:
    proxy.rule(lambda _: Answer(403, "RequestTimeTooSkewed"))
    with pytest.raises(StorageError, match="RequestTimeTooSkewed"):
        read(store)
    assert proxy.count == (2 if operations(proxy)[0] == "HeadObject" else 1)


@pytest.mark.parametrize("status", [405, 501])
def test_a_server_without_listings_leaves_the_denial(store: S3Store, proxy: Proxy, status: int) -> None:
    proxy.spoil("ListObjectsV2", [Answer(status, "NotImplemented")])
    with pytest.raises(AccessDeniedError, match="GetObject was denied"):
        store.get("name")


def test_a_listing_that_fails_is_not_taken_for_a_missing_object(store: S3Store, proxy: Proxy) -> None:
    proxy.spoil("ListObjectsV2", [Answer(500, "InternalError")] * 9)
    with pytest.raises(StorageError, match="InternalError") as caught:
        store.get("name")
    assert not isinstance(caught.value, ObjectNotFoundError)


@every_read
def test_a_read_that_is_not_denied_makes_one_request(
    stores: Stores, proxy: Proxy, bucket: Bucket, read: Callable[[S3Store], object]
) -> None:
    store = stores(retries=1)
    with pytest.raises(ObjectNotFoundError):
        read(store)
    bucket.hold(b"data")
    read(store)
    assert proxy.count == 2 and "ListObjectsV2" not in operations(proxy)


def test_a_missing_source_is_not_copied_and_is_found_missing(store: S3Store, stores: Stores) -> None:
    info = store.put("gone", b"data", Create())
    store.delete(["gone"])
    assert store.copy_from(store, info) is None
    assert not store.holds("gone")


def test_an_answer_s_own_date_tells_how_far_off_the_clock_is(store: S3Store, proxy: Proxy) -> None:
    proxy.clock = 3600.0
    proxy.rule(lambda _: Answer(403, "RequestTimeTooSkewed"))
    with pytest.raises(StorageError) as caught:
        store.get("name")
    assert "clock is 60 min behind the server's" in caught.value.message
    assert caught.value.hint is not None and "NTP" in caught.value.hint
