"""The memory store keeps every store's promises, and shares its objects with fsspec."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Iterator

import fsspec
import pytest

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import ConfigurationError, PreconditionFailedError
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Create, ObjectStore, Overwrite
from cloudckpt.backends.stores.memory import MemoryStore
from support.conformance import StoreConformance


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    store = open_store(Target.parse(f"memory://{uuid.uuid4().hex}/run"))
    assert isinstance(store, MemoryStore)
    yield store
    store.delete([info.name for info in store.list().objects])


class TestMemoryStore(StoreConformance):
    shared_between_processes = False

    @pytest.fixture
    def store(self, store: MemoryStore) -> ObjectStore:
        return store

    def raw_read(self, store: ObjectStore, name: str) -> bytes | None:
        entry = fsspec.filesystem("memory").store.get(_path(store, name))
        return None if entry is None else entry.getvalue()

    def raw_write(self, store: ObjectStore, name: str, data: bytes) -> None:
        fsspec.filesystem("memory").pipe_file(_path(store, name), data)


def test_fsspec_reads_and_lists_what_was_put(store: MemoryStore) -> None:
    store.put("folder/name", b"data", Overwrite())
    assert fsspec.filesystem("memory").cat_file(f"{store.uri}/folder/name") == b"data"
    assert fsspec.filesystem("memory").ls(f"{store.uri}/folder", detail=False) == [
        _path(store, "folder/name")
    ]


def test_what_fsspec_wrote_is_read_and_kept_by_create(store: MemoryStore) -> None:
    fsspec.filesystem("memory").pipe_file(f"{store.uri}/name", b"data")
    assert store.get("name")[0] == b"data"
    with pytest.raises(PreconditionFailedError):
        store.put("name", b"other", Create())


def test_a_pickle_carries_the_name_and_no_objects(store: MemoryStore) -> None:
    store.put("name", b"a payload that does not travel", Overwrite())
    assert b"payload" not in pickle.dumps(store)


def test_a_completed_upload_never_replaces_an_object(store: MemoryStore) -> None:
    upload = store.begin_upload("name")
    part = store.upload_part(upload, 1, 0, [memoryview(b"late")])
    store.put("name", b"first", Overwrite())
    with pytest.raises(PreconditionFailedError):
        store.complete_upload(upload, [part])
    assert store.get("name")[0] == b"first"


@pytest.mark.parametrize("name", ["", "/", "a//b", "../a", "a/..", "./a", "a/"])
def test_a_name_that_is_no_path_below_the_root_is_refused(store: MemoryStore, name: str) -> None:
    with pytest.raises(ConfigurationError):
        store.put(name, b"data", Overwrite())


def _path(store: ObjectStore, name: str) -> str:
    return f"/{store.uri.removeprefix('memory://')}/{name}"
