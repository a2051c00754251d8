"""Answers that are no HTTP or not a store's: the error names the cause, and no budget of retries is spent."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Mapping

import pytest

from cloudckpt.backends.errors import CheckpointError, IntegrityError, StorageError, UnansweredError
from cloudckpt.backends.stores.base import ObjectStore, Overwrite
from cloudckpt.backends.stores.gcs.store import GCSStore
from support.buckets import Bucket, Stores
from support.gcs import GCSServer
from support.malformed import NOT_A_STORE, NOT_HTTP, redirection
from support.proxy import Proxy, RawAnswer, proxied

_TRIES = 3
"""Requests that an answer which is no HTTP is asked for with."""


def _upload(store: ObjectStore) -> object:
    upload = store.begin_upload("name")
    return store.complete_upload(upload, [store.upload_part(upload, 1, 0, [memoryview(b"d" * (256 << 10))])])


_OPERATIONS: Mapping[str, Callable[[ObjectStore], object]] = {
    "ListObjectsV2": lambda store: store.list(),
    "PutObject": lambda store: store.put("name", b"data", Overwrite()),
    "UploadPart": _upload,
    "GetObject": lambda store: store.read_into("name", 0, [memoryview(bytearray(4))]),
}
_ON_S3 = {**_OPERATIONS, "CompleteMultipartUpload": _upload}


@pytest.fixture(scope="module")
def gcs_proxy(gcs: GCSServer) -> Iterator[Proxy]:
    with proxied(gcs.endpoint) as made:
        yield made


@pytest.fixture
def on_gcs(gcs: GCSServer, gcs_proxy: Proxy, open_gcs: Callable[..., GCSStore]) -> GCSStore:
    gcs_proxy.forget()
    store = open_gcs(gcs_proxy.endpoint, gcs.new_bucket())
    store.put("name", b"data", Overwrite())
    _upload(store)
    gcs_proxy.forget()
    return store


def _failed(act: Callable[[ObjectStore], object], store: ObjectStore, proxy: Proxy) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        act(store)
    assert caught.value.uri == store.uri and proxy.endpoint in caught.value.message
    assert "endpoint_url" in (caught.value.hint or "")
    return caught.value


@pytest.mark.parametrize("operation", _ON_S3)
@pytest.mark.parametrize("kind", NOT_HTTP)
def test_an_answer_of_s3_that_is_no_http_is_named_and_soon_given_up(
    stores: Stores, proxy: Proxy, bucket: Bucket, operation: str, kind: str
) -> None:
    data, said = NOT_HTTP[kind]
    if (operation, kind) == ("CompleteMultipartUpload", "two lengths"):
        pytest.skip("http.client takes the first")
    bucket.hold(b"data")
    proxy.spoil(operation, itertools.repeat(RawAnswer(data)))
    error = _failed(_ON_S3[operation], stores(retries=10), proxy)
    assert isinstance(error, UnansweredError)
    assert said in error.message and ("malformed HTTP" in error.message or "speaks TLS" in error.message)
    assert len(proxy.seen(operation)) == _TRIES


@pytest.mark.parametrize("operation", _OPERATIONS)
@pytest.mark.parametrize("kind", NOT_HTTP)
def test_an_answer_of_gcs_that_is_no_http_is_named_and_soon_given_up(
    on_gcs: GCSStore, gcs_proxy: Proxy, operation: str, kind: str
) -> None:
    data, said = NOT_HTTP[kind]
    gcs_proxy.spoil(operation, itertools.repeat(RawAnswer(data)))
    error = _failed(_OPERATIONS[operation], on_gcs, gcs_proxy)
    assert isinstance(error, UnansweredError)
    assert said in error.message and ("malformed HTTP" in error.message or "speaks TLS" in error.message)
    # A part whose answer was lost also has the session asked how much of it arrived.
    assert len(gcs_proxy.seen(operation)) <= (2 * _TRIES if operation == "UploadPart" else _TRIES)


@pytest.mark.parametrize("operation", _ON_S3)
@pytest.mark.parametrize("kind", NOT_A_STORE)
def test_a_page_in_the_place_of_s3_is_named_at_once(
    stores: Stores, proxy: Proxy, bucket: Bucket, operation: str, kind: str
) -> None:
    data, said = NOT_A_STORE[kind]
    bucket.hold(b"data")
    proxy.spoil(operation, itertools.repeat(RawAnswer(data)))
    error = _failed(_ON_S3[operation], stores(retries=10), proxy)
    assert type(error) is StorageError
    assert "not as an S3 server does" in error.message and said in error.message
    assert "login page" in (error.hint or "")
    assert len(proxy.seen(operation)) == 1


@pytest.mark.parametrize("operation", _OPERATIONS)
@pytest.mark.parametrize("kind", NOT_A_STORE)
def test_a_page_in_the_place_of_gcs_is_named_at_once(
    on_gcs: GCSStore, gcs_proxy: Proxy, operation: str, kind: str
) -> None:
    """A page must not pass for an object's bytes, nor for the end of an upload."""
    data, said = NOT_A_STORE[kind]
    gcs_proxy.spoil(operation, itertools.repeat(RawAnswer(data)))
    error = _failed(_OPERATIONS[operation], on_gcs, gcs_proxy)
    assert type(error) is StorageError and not isinstance(error, IntegrityError)
    assert "not as GCS does" in error.message and said in error.message
    assert "login page" in (error.hint or "")
    assert len(gcs_proxy.seen(operation)) == 1


@pytest.mark.parametrize("operation", ["PutObject", "GetObject", "ListObjectsV2"])
def test_a_redirection_to_a_login_page_names_where_it_leads_and_no_more_of_it(  # noqa: PLR0917 - fixtures
    stores: Stores, proxy: Proxy, bucket: Bucket, on_gcs: GCSStore, gcs_proxy: Proxy, operation: str
) -> None:
    bucket.hold(b"data")
    answer = RawAnswer(redirection("http://user:canary@portal.invalid/login?session=canary"))
    for store, before in ((stores(retries=10), proxy), (on_gcs, gcs_proxy)):
        before.spoil(operation, itertools.repeat(answer))
        error = _failed(_OPERATIONS[operation], store, before)
        assert "status 302, a redirection to http://portal.invalid)" in error.message
        assert "canary" not in str(error)
        assert len(before.seen(operation)) == 1


@pytest.mark.parametrize("operation", _OPERATIONS)
def test_one_malformed_answer_is_no_error(  # noqa: PLR0917 - fixtures
    stores: Stores, proxy: Proxy, bucket: Bucket, on_gcs: GCSStore, gcs_proxy: Proxy, operation: str
) -> None:
    bucket.hold(b"data")
    for store, before in ((stores(retries=10), proxy), (on_gcs, gcs_proxy)):
        before.spoil(operation, [RawAnswer(b"SSH-2.0-OpenSSH_9.6\r\n")])
        _OPERATIONS[operation](store)


@pytest.mark.parametrize("operation", _OPERATIONS)
def test_connections_that_end_without_an_answer_are_retried_as_ever(  # noqa: PLR0917 - fixtures
    stores: Stores, proxy: Proxy, bucket: Bucket, on_gcs: GCSStore, gcs_proxy: Proxy, operation: str
) -> None:
    bucket.hold(b"data")
    for store, before in ((stores(retries=10), proxy), (on_gcs, gcs_proxy)):
        before.spoil(operation, [RawAnswer(b"")] * (_TRIES + 2))
        _OPERATIONS[operation](store)
        assert len(before.seen(operation)) > _TRIES


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_length_that_is_no_number_is_an_error_of_the_store(
    stores: Stores, proxy: Proxy, bucket: Bucket
) -> None:
    """botocore raises a bare ValueError."""
    bucket.hold(b"data")
    answer = RawAnswer(b"HTTP/1.1 200 OK\r\nContent-Length: abc\r\nETag: x\r\n\r\ndata")
    proxy.spoil("GetObject", itertools.repeat(answer))
    error = _failed(_ON_S3["GetObject"], stores(retries=10), proxy)
    assert isinstance(error, UnansweredError) and "'abc'" in error.message
    assert len(proxy.seen("GetObject")) == _TRIES
    del error
    gc.collect()  # botocore leaves the connection to the collector
