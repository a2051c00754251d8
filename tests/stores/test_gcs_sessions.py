"""When the GCS store asks a session for the bytes it holds, and what it does where it can't be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cloudckpt.backends.errors import (
    IntegrityError,
    UnsupportedError,
)
from cloudckpt.backends.stores.base import Upload
from cloudckpt.backends.stores.gcs.store import GCSStore
from support.fake_gcs import FakeGCS
from support.gcs import GCSServer
from support.proxy import LoseAnswer, Request, Spoiling, proxied

_GRANULE = 256 << 10

Opened = Callable[..., GCSStore]


@pytest.fixture(autouse=True)
def _as_google_again(gcs: GCSServer) -> Iterator[None]:
    """Forget the faults and quirks of a test, also of one that failed."""
    yield
    gcs.reset()


def _sent(store: GCSStore, sizes: list[int]) -> tuple[Upload, list[Any]]:
    upload, parts, offset = store.begin_upload("name"), [], 0
    for number, size in enumerate(sizes, 1):
        parts.append(store.upload_part(upload, number, offset, [memoryview(bytes(size))]))
        offset += size
    return upload, parts


@pytest.mark.parametrize("size", [0, 1, _GRANULE - 1])
@pytest.mark.parametrize("name", ["gcs", "fake_gcs"])
def test_a_part_smaller_than_a_chunk_sends_nothing_to_its_session(
    request: pytest.FixtureRequest, open_gcs: Opened, name: str, size: int
) -> None:
    server: GCSServer = request.getfixturevalue(name)
    with proxied(server.endpoint) as proxy:
        store = open_gcs(
            proxy.endpoint, server.new_bucket(xml=False) if name == "gcs" else server.new_bucket()
        )
        assert store.part_limits.in_order
        proxy.forget()
        upload, parts = _sent(store, [size])
        assert [one.operation for one in proxy.all()] == ["CreateMultipartUpload"]
        assert store.list().objects == ()
        store.complete_upload(upload, parts)
        assert store.get("name")[0] == bytes(size)


def test_a_session_is_asked_for_its_bytes_only_after_a_lost_answer(gcs: GCSServer, open_gcs: Opened) -> None:
    store = open_gcs(gcs.endpoint, gcs.new_bucket(xml=False))
    store.probe()
    gcs.reset()
    _sent(store, [_GRANULE, _GRANULE, 100])
    assert [method for method, *_ in gcs.requests()] == ["POST", "PUT", "PUT"]
    gcs.spoil({"method": "PUT", "path": "upload_id", "do": "reset after"})
    gcs.reset()
    gcs.spoil({"method": "PUT", "path": "upload_id", "do": "reset after"})
    _sent(store, [_GRANULE])
    assert [method for method, *_ in gcs.requests()] == ["POST", "PUT", "PUT"]
    gcs.reset()


def test_an_upload_that_can_not_be_asked_about_fails_and_leaves_nothing_visible(
    fake_gcs: FakeGCS, open_gcs: Opened
) -> None:
    with proxied(fake_gcs.endpoint) as proxy:
        store = open_gcs(proxy.endpoint, fake_gcs.new_bucket())
        proxy.spoil("UploadPart", [LoseAnswer()])
        with pytest.raises(UnsupportedError, match="can't be resumed"):
            _sent(store, [_GRANULE])
        assert store.list().objects == ()


def test_a_completion_whose_answer_was_lost_is_found_by_the_object(
    fake_gcs: FakeGCS, open_gcs: Opened
) -> None:
    with proxied(fake_gcs.endpoint) as proxy:
        store = open_gcs(proxy.endpoint, fake_gcs.new_bucket())
        upload, parts = _sent(store, [_GRANULE, 5])
        proxy.rule(_once(lambda request: request.method == "PUT"))
        info = store.complete_upload(upload, parts)
        assert (info.size, info.version) == (_GRANULE + 5, store.stat("name").version)


def _once(wanted: Callable[[Request], bool]) -> Callable[[Request], Spoiling]:
    """Lose the answer to the first request of a kind."""
    seen: list[Request] = []

    def rule(request: Request) -> Spoiling:
        if wanted(request) and not seen:
            seen.append(request)
            return LoseAnswer()
        return None

    return rule


def test_an_object_that_holds_a_chunk_twice_is_deleted(fake_gcs: FakeGCS, open_gcs: Opened) -> None:
    store = open_gcs(fake_gcs.endpoint, fake_gcs.new_bucket())
    upload, (part,) = _sent(store, [_GRANULE])
    store.upload_part(upload, 1, 0, [memoryview(bytes(_GRANULE))])
    with pytest.raises(IntegrityError, match=f"{2 * _GRANULE} bytes"):
        store.complete_upload(upload, [part])
    assert store.list().objects == ()


@pytest.mark.parametrize("size", [None, 0, _GRANULE])
def test_to_look_for_a_pending_upload_completes_none(
    fake_gcs: FakeGCS, open_gcs: Opened, size: int | None
) -> None:
    store = open_gcs(fake_gcs.endpoint, fake_gcs.new_bucket())
    upload = store.begin_upload("name") if size is None else _sent(store, [size])[0]
    assert not store.is_pending(upload)
    assert store.list().objects == ()


def test_a_server_that_cancels_no_sessions_is_named(emulator: GCSServer, open_gcs: Opened) -> None:
    store = open_gcs(emulator.endpoint, emulator.new_bucket())
    upload, _ = _sent(store, [_GRANULE])
    with pytest.raises(UnsupportedError, match="does not cancel"):
        store.abort_upload(upload)
