"""Answers of servers that are like GCS and not quite: batches, missing fields, endpoints, denials."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import (
    AccessDeniedError,
    ConfigurationError,
    ObjectNotFoundError,
    StorageError,
)
from cloudckpt.backends.stores.base import Create, Overwrite, Upload
from cloudckpt.backends.stores.gcs.store import GCSStore
from support.answers import WELCOME, answering
from support.gcs import GCSServer

_GRANULE = 256 << 10

Opened = Callable[..., GCSStore]


@pytest.fixture(autouse=True)
def _as_google_again(gcs: GCSServer) -> Iterator[None]:
    """Forget the faults and quirks of a test, also of one that failed."""
    yield
    gcs.reset()


# Batches


@pytest.mark.parametrize("status", [400, 404, 405, 501])
def test_without_batches_objects_are_deleted_one_by_one_and_no_batch_is_sent_again(
    gcs: GCSServer, open_gcs: Opened, status: int
) -> None:
    bucket = gcs.new_bucket()
    store = open_gcs(gcs.endpoint, bucket)
    gcs.reset()
    gcs.imitate(batches=status)
    for name in ("a", "b", "c"):
        store.put(name, b"data", Overwrite())
    store.delete(["a", "b", "missing"])
    assert [info.name for info in store.list().objects] == ["c"]
    assert len([path for _, path, *_ in gcs.requests() if path.startswith("/batch")]) == 1
    gcs.reset()
    gcs.imitate(batches=status)
    open_gcs(gcs.endpoint, bucket).delete(["c"])
    assert [path for _, path, *_ in gcs.requests() if path.startswith("/batch")] == []
    assert store.list().objects == ()
    gcs.reset()


def test_answers_of_a_batch_without_numbers_are_in_order(gcs: GCSServer, open_gcs: Opened) -> None:
    store = open_gcs(gcs.endpoint, gcs.new_bucket())
    gcs.reset()
    gcs.imitate(numbers_batches=False)
    names = [f"name-{number}" for number in range(5)]
    for name in names[::2]:
        store.put(name, b"data", Overwrite())
    store.delete(names)
    assert store.list().objects == ()
    gcs.reset()


def test_the_emulator_deletes_by_batches(emulator: GCSServer, open_gcs: Opened) -> None:
    store = open_gcs(emulator.endpoint, emulator.new_bucket())
    for name in ("a", "b", "c"):
        store.put(name, b"data", Overwrite())
    store.delete(["a", "missing", "b"])
    assert [info.name for info in store.list().objects] == ["c"]


# Answers that lack something


@pytest.mark.parametrize("field", ["generation", "size"])
def test_an_answer_without_a_field_is_named(gcs: GCSServer, open_gcs: Opened, field: str) -> None:
    store = open_gcs(gcs.endpoint, gcs.new_bucket(xml=False))
    store.put("name", b"data", Overwrite())
    upload = store.begin_upload("name")
    parts = [store.upload_part(upload, 1, 0, [memoryview(b"data")])]
    gcs.reset()
    gcs.imitate(lacks=field)
    acts: list[Callable[[], Any]] = [
        lambda: store.stat("name"),
        lambda: store.put("name", b"data", Overwrite()),
        store.list,
        lambda: store.complete_upload(upload, parts),
    ]
    for act in acts:
        with pytest.raises(StorageError, match=f"answered without a {field}: it does not support") as caught:
            act()
        assert gcs.endpoint in str(caught.value) and caught.value.uri == store.uri
    gcs.reset()


@pytest.mark.parametrize(
    ("kind", "said"),
    [("text/html", "not as GCS does"), ("text/plain", "does not support GCS's JSON API in full")],
)
def test_a_server_that_speaks_no_json_is_named(open_gcs: Opened, kind: str, said: str) -> None:
    with answering(200, WELCOME, kind) as endpoint:
        store = open_gcs(endpoint, "bucket")
        upload = Upload("name", f"{endpoint}/upload/storage/v1/b/bucket/o?upload_id=1")
        acts: list[Callable[[], Any]] = [
            store.list,
            lambda: store.stat("name"),
            lambda: store.put("name", b"data", Overwrite()),
            lambda: store.delete(["name"]),
            lambda: store.begin_upload("name"),
            lambda: store.complete_upload(upload, []),
            lambda: store.capabilities,
        ]
        for act in acts:
            with pytest.raises(StorageError, match=said):
                act()


def test_the_generation_of_what_is_read_is_looked_up_where_it_is_not_sent(
    emulator: GCSServer, open_gcs: Opened
) -> None:
    store = open_gcs(emulator.endpoint, emulator.new_bucket())
    version = store.put("name", b"data", Overwrite()).version
    data, info = store.get("name")
    assert (data, info.version) == (b"data", version)


# Endpoints


@pytest.mark.parametrize("scheme", ["", "http://"])
@pytest.mark.parametrize("source", ["variable", "storage_options"])
def test_an_endpoint_without_a_scheme_is_one_of_http(
    gcs: GCSServer, monkeypatch: pytest.MonkeyPatch, scheme: str, source: str
) -> None:
    endpoint = scheme + gcs.endpoint.removeprefix("http://")
    options: dict[str, Any] = {}
    if source == "variable":
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    else:
        options["storage_options"] = {"endpoint_url": endpoint}
    with GCSStore(Target.parse(f"gs://{gcs.new_bucket()}/run", **options)) as store:
        store.put("name", b"data", Create())
        assert store.get("name")[0] == b"data"


@pytest.mark.parametrize(
    "endpoint", ["http://", "ftp://host", "host:port", "http://host:99999", "://x", "a b"]
)
def test_a_variable_that_names_no_server_is_refused(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    with (
        GCSStore(Target.parse("gs://bucket/run")) as store,
        pytest.raises(ConfigurationError, match="STORAGE_EMULATOR_HOST is not the URL") as caught,
    ):
        store.stat("name")
    assert caught.value.hint is not None and "http://localhost" in caught.value.hint


# Permissions


@pytest.mark.parametrize("operation", ["get", "stat", "read_into", "holds"])
def test_a_missing_object_behind_a_403_is_not_found(gcs: GCSServer, open_gcs: Opened, operation: str) -> None:
    """As GCS answers an account that may list below its own prefix alone."""
    bucket = gcs.new_bucket()
    store = open_gcs(gcs.endpoint, bucket, "runs/run")
    store.put("name and more", b"data", Overwrite())
    gcs.deny(bucket, "storage.objects.list outside runs/")
    asks: dict[str, Callable[[], Any]] = {
        "get": lambda: store.get("name"),
        "stat": lambda: store.stat("name"),
        "read_into": lambda: store.read_into("name", 0, [memoryview(bytearray(4))]),
    }
    if operation == "holds":
        assert not store.holds("name")
        assert store.holds("name and more")
    else:
        with pytest.raises(ObjectNotFoundError) as caught:
            asks[operation]()
        assert (caught.value.uri, caught.value.object_name) == (store.uri, "name")
    gcs.deny(bucket)


def test_a_denied_listing_is_a_denial(gcs: GCSServer, open_gcs: Opened) -> None:
    bucket = gcs.new_bucket()
    store = open_gcs(gcs.endpoint, bucket)
    gcs.deny(bucket, "storage.objects.list")
    with pytest.raises(AccessDeniedError) as caught:
        store.stat("name")
    assert caught.value.hint is not None
    assert "storage.objects.get" in caught.value.hint and "storage.objects.list" in caught.value.hint
    gcs.deny(bucket)


def test_an_object_that_is_there_and_denied_is_a_denial(gcs: GCSServer, open_gcs: Opened) -> None:
    bucket = gcs.new_bucket()
    store = open_gcs(gcs.endpoint, bucket)
    store.put("name", b"data", Overwrite())
    gcs.deny(bucket, "storage.objects.get")
    with pytest.raises(AccessDeniedError):
        store.get("name")
    with pytest.raises(ObjectNotFoundError):
        store.get("nam")
    gcs.deny(bucket)


def test_the_first_save_of_a_run_needs_no_listing_beyond_its_prefix(gcs: GCSServer) -> None:
    bucket = gcs.new_bucket()
    uri = f"gs://{bucket}/runs/run/step"
    gcs.deny(bucket, "storage.objects.list outside runs/")
    writer = cloudckpt.StorageWriter(uri, endpoint_url=gcs.endpoint)
    dcp.save({"t": torch.arange(10)}, storage_writer=writer, no_dist=True)
    loaded = {"t": torch.zeros(10, dtype=torch.int64)}
    dcp.load(loaded, storage_reader=cloudckpt.StorageReader(uri, endpoint_url=gcs.endpoint), no_dist=True)
    assert torch.equal(loaded["t"], torch.arange(10))
    gcs.deny(bucket)
