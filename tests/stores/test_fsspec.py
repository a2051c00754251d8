"""The generic store over file systems of fsspec: a local folder, and a bucket by way of s3fs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudckpt.backends.store import ObjectStore
from cloudckpt.backends.stores.fsspec import FsspecStore
from cloudckpt.backends.target import Target
from support.conformance import StoreConformance
from support.servers import S3Server


class TestFolder(StoreConformance):
    many = 300

    @pytest.fixture
    def store(self, tmp_path: Path) -> FsspecStore:
        options = {"path": str(tmp_path), "target_protocol": "file"}
        return FsspecStore(Target.parse("dir://run", storage_options=options))

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "run"

    def raw_read(self, store: ObjectStore, name: str) -> bytes | None:
        assert store.uri == "dir://run"
        path = self.folder / name
        return path.read_bytes() if path.is_file() else None

    def raw_write(self, store: ObjectStore, name: str, data: bytes) -> None:
        assert store.uri == "dir://run"
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


class TestBucketThroughS3fs(StoreConformance):
    many = 20

    @pytest.fixture
    def store(self, moto: S3Server) -> FsspecStore:
        self.server, self.bucket = moto, moto.new_bucket()
        options = {
            "path": f"{self.bucket}/prefix",
            "target_protocol": "s3",
            "target_options": {**moto.storage_options, "endpoint_url": moto.endpoint},
        }
        return FsspecStore(Target.parse("dir://run", storage_options=options))

    def raw_read(self, store: ObjectStore, name: str) -> bytes | None:
        assert store.uri == "dir://run"
        client = self.server.client()
        try:
            return client.get_object(Bucket=self.bucket, Key=f"prefix/run/{name}")["Body"].read()
        except client.exceptions.NoSuchKey:
            return None

    def raw_write(self, store: ObjectStore, name: str, data: bytes) -> None:
        assert store.uri == "dir://run"
        self.server.client().put_object(Bucket=self.bucket, Key=f"prefix/run/{name}", Body=data)
