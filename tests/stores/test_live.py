"""The store that a user has named keeps every store's promises."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import pytest

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import ObjectStore
from support import live
from support.conformance import StoreConformance
from support.places import Place
from support.shortcomings import faults_of, races_of


class TestLiveStore(StoreConformance):
    many = 1001
    lists_uploads = not (live.uri() or "").startswith(("gs:", "gcs:"))

    @pytest.fixture
    def faults(self) -> Mapping[str, str]:
        return faults_of(Place.named_by_the_user())

    @pytest.fixture
    def races(self) -> Mapping[str, str]:
        return races_of(Place.named_by_the_user())

    @pytest.fixture
    def store(self) -> ObjectStore:
        return self._open()

    def beside(self, store: ObjectStore) -> ObjectStore:
        assert store.uri
        return self._open()

    def raw_read(self, store: ObjectStore, name: str) -> bytes | None:
        place = self._place_of(store)
        return place.read(name) if name in place.visible() else None

    def raw_write(self, store: ObjectStore, name: str, data: bytes) -> None:
        self._place_of(store).write(name, data)

    def _open(self) -> ObjectStore:
        place = Place.named_by_the_user().child(f"a run/{uuid.uuid4().hex}")
        return open_store(Target.parse(place.uri, **place.options, retries=1))

    def _place_of(self, store: ObjectStore) -> Place:
        root = Place.named_by_the_user()
        return root.child(store.uri.removeprefix(root.uri).lstrip("/").replace("%20", " "))
