"""The generic store over file systems of fsspec: a local folder, and a bucket by way of s3fs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import IntegrityError, ObjectNotFoundError, StorageError
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.stores.fsspec import FsspecStore
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


class _Changing(DirFileSystem):  # type: ignore[misc] # fsspec is untyped
    """A folder in which another writer changes an object whenever it is read, so many times."""

    protocol = "changing"

    def __init__(self, changes: int, **options: Any) -> None:
        super().__init__(**options)
        self.changes = changes
        self.reads: list[tuple[int | None, int | None]] = []

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self.reads.append((start, end))
        data: bytes = super().cat_file(path, start, end, **options)
        if self.changes:
            self.changes -= 1
            with super().open(path, "ab") as file:
                file.write(b"x")
        return data


@pytest.fixture
def changing(tmp_path: Path) -> Callable[[int], FsspecStore]:
    fsspec.register_implementation("changing", _Changing, clobber=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "name").write_bytes(b"data")

    def store(changes: int) -> FsspecStore:
        options = {"path": str(tmp_path), "target_protocol": "file", "changes": changes}
        return FsspecStore(Target.parse("changing://run", storage_options=options))

    return store


def test_an_object_that_changes_while_it_is_read_is_read_again(
    changing: Callable[[int], FsspecStore],
) -> None:
    store = changing(3)
    data, info = store.get("name")
    assert (data, info) == (b"dataxxx", store.stat("name"))


def test_an_object_that_never_stops_changing_is_given_up(changing: Callable[[int], FsspecStore]) -> None:
    store = changing(10_000)
    with pytest.raises(StorageError, match="changed during each") as caught:
        store.get("name")
    assert (caught.value.uri, caught.value.object_name) == (store.uri, "name")
    assert len(store._fs.reads) == 10


def test_many_buffers_are_read_in_one_request(changing: Callable[[int], FsspecStore]) -> None:
    store = changing(0)
    memory = bytearray(4)
    store.read_into("name", 0, [memoryview(memory)[index : index + 1] for index in range(4)])
    assert memory == b"data"
    assert store._fs.reads == [(0, 4)]


def test_a_long_range_is_read_in_blocks_that_cross_buffers(
    changing: Callable[[int], FsspecStore], tmp_path: Path
) -> None:
    data = random.Random(0).randbytes((17 << 20) + 3)
    (tmp_path / "run" / "name").write_bytes(data)
    store = changing(0)
    memory = bytearray(len(data) - 1)
    cuts = [0, 5, 9 << 20, len(memory)]
    store.read_into("name", 1, [memoryview(memory)[a:b] for a, b in itertools.pairwise(cuts)])
    assert memory == data[1:]
    assert [end - start for start, end in store._fs.reads] == [8 << 20, 8 << 20, (1 << 20) + 2]


def test_what_is_not_there_is_not_read_at_all(changing: Callable[[int], FsspecStore]) -> None:
    store = changing(0)
    with pytest.raises(ObjectNotFoundError):
        store.get("missing")
    with pytest.raises(ObjectNotFoundError):
        store.read_into("missing", 0, [memoryview(bytearray(5))])
    with pytest.raises(IntegrityError):
        store.read_into("name", 0, [memoryview(bytearray(5))])
    assert store._fs.reads == []


class _Larger(_Changing):
    """A folder that says that every file has four bytes."""

    protocol = "larger"

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = super().info(path, **options)
        return {**found, "size": 4}


def test_an_object_that_is_larger_than_its_server_says_is_not_read_whole(tmp_path: Path) -> None:
    fsspec.register_implementation("larger", _Larger, clobber=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "name").write_bytes(bytes(1 << 20))
    options = {"path": str(tmp_path), "target_protocol": "file", "changes": 0}
    store = FsspecStore(Target.parse("larger://run", storage_options=options))
    with pytest.raises(StorageError) as caught:
        store.get("name")
    assert (caught.value.uri, caught.value.object_name) == (store.uri, "name")
    assert set(store._fs.reads) == {(0, 5)}
