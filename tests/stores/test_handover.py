"""Uploads that two processes begin and a third one ends: as a commit does it, or an abort."""

from __future__ import annotations

import pytest

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import StorageError
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import ObjectStore, Part, Upload
from support import fake_gcs
from support.places import Place
from support.ranks import RankPools

PART = 5 << 20
"""Bytes, a multiple of what GCS takes and as much as S3 asks for."""


def opened(place: Place) -> ObjectStore:
    """Each request is tried once: moto answers 500 to whoever completes what is gone."""
    return open_store(Target.parse(place.uri, **place.options, retries=0))


def content(rank: int) -> bytes:
    return bytes([rank + 1]) * PART + bytes([rank + 11]) * 1000


def send(rank: int, place: Place) -> tuple[Upload, list[Part]]:
    """Begin an upload in a rank's process, send all of its bytes, and leave it open."""
    data = memoryview(content(rank))
    with opened(place) as store:
        upload = store.begin_upload(f"object-{rank}")
        first = store.upload_part(upload, 1, 0, [data[:PART]])
        return upload, [first, store.upload_part(upload, 2, PART, [data[PART:]])]


def visible(place: Place) -> set[str]:
    """Names that a reader can meet, and not the hidden files that hold a folder's uploads."""
    return {name for name in place.visible() if not name.startswith(".")}


def test_nothing_is_visible_before_a_third_process_ends_them_and_all_is_after(
    rank_pool: RankPools, place: Place
) -> None:
    handed_over = rank_pool(2)(send, place)
    assert visible(place) == set()
    with opened(place) as store:
        for upload, parts in handed_over:
            assert store.complete_upload(upload, parts).size == PART + 1000
    assert visible(place) == {"object-0", "object-1"}
    assert place.pending() == set()
    assert [place.read(f"object-{rank}") == content(rank) for rank in range(2)] == [True, True]


def test_a_third_process_can_give_them_up_and_none_is_left(
    request: pytest.FixtureRequest, rank_pool: RankPools, place: Place
) -> None:
    if place.name == fake_gcs.NAME:
        reason = fake_gcs.FAULTS["test_what_was_aborted_can_not_be_completed"]
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    handed_over = rank_pool(2)(send, place)
    with opened(place) as store:
        for upload, _ in handed_over:
            store.abort_upload(upload)
        assert place.visible() == place.pending() == set()
        for upload, parts in handed_over:
            with pytest.raises(StorageError):
                store.complete_upload(upload, parts)
    assert place.visible() == set()
