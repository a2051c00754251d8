"""The GCS store on a strict server of this project's own, and on fake-gcs-server."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.stores.gcs.store import GCSStore
from support.conformance import StoreConformance
from support.fake_gcs import FAULTS, FakeGCS
from support.gcs import GCSServer


class _OnGCS(StoreConformance):
    server: GCSServer
    bucket: str

    def opened(self, server: GCSServer, *, xml: bool = True) -> GCSStore:
        self.server, self.bucket = server, server.new_bucket(xml=xml)
        return GCSStore(Target.parse(f"gs://{self.bucket}/some/prefix", endpoint_url=server.endpoint))

    def beside(self, store: ObjectStore) -> ObjectStore:
        return GCSStore(Target.parse(f"gs://{self.bucket}/beside it", endpoint_url=self.server.endpoint))

    def raw_read(self, store: ObjectStore, name: str) -> bytes | None:
        assert store.uri == f"gs://{self.bucket}/some/prefix"
        return self.server.read(self.bucket, f"some/prefix/{name}")

    def raw_write(self, store: ObjectStore, name: str, data: bytes) -> None:
        assert store.uri == f"gs://{self.bucket}/some/prefix"
        self.server.write(self.bucket, f"some/prefix/{name}", data)


class TestGCSStore(_OnGCS):
    @pytest.fixture
    def store(self, gcs: GCSServer) -> GCSStore:
        return self.opened(gcs)


class TestSessions(_OnGCS):
    """A server without the XML API. What is slow and not about uploads is tried above."""

    lists_uploads = False
    test_many_objects_are_listed_once_each_in_order_and_deleted = None  # type: ignore[assignment]
    test_any_split_into_buffers_comes_back_the_same_through_any_other = None  # type: ignore[assignment]

    @pytest.fixture
    def store(self, gcs: GCSServer) -> GCSStore:
        return self.opened(gcs, xml=False)


class TestFakeGCS(_OnGCS):
    lists_uploads = False

    @pytest.fixture
    def store(self, fake_gcs: FakeGCS) -> GCSStore:
        return self.opened(fake_gcs)

    @pytest.fixture
    def faults(self) -> Mapping[str, str]:
        return FAULTS
