"""What the GCS store finds out about a server: features as probed, and requests that this takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import (
    ConfigurationError,
)
from cloudckpt.backends.manage.gc import collect_garbage
from cloudckpt.backends.stores.base import Create, Overwrite, Update
from cloudckpt.backends.stores.gcs import client as gcs_client
from cloudckpt.backends.stores.gcs import endpoint as gcs_endpoint
from cloudckpt.backends.stores.gcs.capabilities import GCSCapabilities, PutSupport
from cloudckpt.backends.stores.gcs.store import GCSStore
from cloudckpt.doctor import examine
from support.fake_gcs import FakeGCS
from support.gcs import GCSServer
from support.proxy import Request, Spoiling, proxied

_GRANULE = 256 << 10
_ALL = GCSCapabilities(
    PutSupport(create=True, update=True), copy_source=True, upload_status=True, multipart=True
)
_FAKE = GCSCapabilities(
    PutSupport(create=True, update=True), copy_source=False, upload_status=False, multipart=False
)
_NONE = GCSCapabilities(
    PutSupport(create=False, update=False), copy_source=False, upload_status=False, multipart=False
)

Opened = Callable[..., GCSStore]


@pytest.fixture(autouse=True)
def _as_google_again(gcs: GCSServer) -> Iterator[None]:
    """Forget the faults and quirks of a test, also of one that failed."""
    yield
    gcs.reset()


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every endpoint for Google's own."""
    monkeypatch.setattr(gcs_client, "is_google", lambda _: True)
    monkeypatch.setattr(gcs_client, "serves_xml", lambda _: True)


# Probing


@pytest.mark.parametrize(("name", "expected"), [("gcs", _ALL), ("fake_gcs", _FAKE), ("emulator", _NONE)])
def test_each_server_is_known_by_its_answers(
    request: pytest.FixtureRequest, open_gcs: Opened, name: str, expected: GCSCapabilities
) -> None:
    server: GCSServer = request.getfixturevalue(name)
    store = open_gcs(server.endpoint, server.new_bucket())
    assert store.probe() == expected
    assert store.capabilities.conditional_create == expected.put.create
    assert store.capabilities.conditional_update == expected.put.update
    assert store.list().objects == ()


def test_a_server_is_probed_once_a_bucket(gcs: GCSServer, open_gcs: Opened) -> None:
    bucket = gcs.new_bucket()
    open_gcs(gcs.endpoint, bucket).probe()
    gcs.reset()
    open_gcs(gcs.endpoint, bucket, "another run").probe()
    assert gcs.requests() == []


@pytest.mark.parametrize("skip", range(5))
def test_a_lost_answer_to_a_probe_is_not_taken_for_a_missing_feature(
    gcs: GCSServer, open_gcs: Opened, skip: int
) -> None:
    gcs.reset()
    gcs.spoil({"method": "POST", "path": "/o", "do": "reset after", "skip": skip})
    store = open_gcs(gcs.endpoint, gcs.new_bucket())
    assert store.probe() == _ALL
    assert gcs.faults_to_come() == 0
    assert store.list().objects == ()
    gcs.reset()


def test_a_server_that_refuses_conditions_that_hold_supports_none(gcs: GCSServer, open_gcs: Opened) -> None:
    gcs.reset()
    gcs.imitate(refuses_conditions=True)
    store = open_gcs(gcs.endpoint, gcs.new_bucket())
    assert store.probe().put == PutSupport(create=False, update=False)
    for condition in (Create(), Update("1")):
        with pytest.raises(ConfigurationError, match="ifGenerationMatch"):
            store.put("name", b"data", condition)
    gcs.reset()


@pytest.mark.parametrize("refuses", ["gcs", "emulator"])
def test_without_conditions_a_checkpoint_is_overwritten_by_check_and_put(
    gcs: GCSServer, emulator: GCSServer, caplog: pytest.LogCaptureFixture, refuses: str
) -> None:
    gcs.reset()
    gcs.imitate(refuses_conditions=True)
    server = gcs if refuses == "gcs" else emulator
    uri, endpoint = f"gs://{server.new_bucket()}/run", server.endpoint
    writer = cloudckpt.StorageWriter(uri, endpoint_url=endpoint, overwrite=True)
    for value in range(3):
        dcp.save({"t": torch.full((100,), value)}, storage_writer=writer, no_dist=True)
    assert [record.name for record in caplog.records].count("cloudckpt.backends.save.commit") == 1
    loaded = {"t": torch.zeros(100, dtype=torch.int64)}
    dcp.load(loaded, storage_reader=cloudckpt.StorageReader(uri, endpoint_url=endpoint), no_dist=True)
    assert torch.equal(loaded["t"], torch.full((100,), 2))
    gcs.reset()


@pytest.mark.usefixtures("google")
def test_googles_own_endpoint_is_sent_no_probe(gcs: GCSServer, open_gcs: Opened) -> None:
    bucket = gcs.new_bucket()
    uri, endpoint = f"gs://{bucket}/run", gcs.endpoint
    store, beside = open_gcs(endpoint, bucket, "one"), open_gcs(endpoint, bucket, "other")
    writer = cloudckpt.StorageWriter(f"{uri}/step", endpoint_url=endpoint, overwrite=True)

    def save() -> None:
        dcp.save({"t": torch.arange(300_000), "x": 1}, storage_writer=writer, no_dist=True)

    def upload(size: int) -> None:
        begun = store.begin_upload("upload")
        store.complete_upload(begun, [store.upload_part(begun, 1, 0, [memoryview(bytes(size))])])

    def requests(act: Callable[[], Any]) -> int:
        gcs.reset()
        act()
        return len(gcs.requests())

    assert requests(lambda: (store.capabilities, store.probe())) == 0
    assert requests(save) == 9
    assert requests(save) == 10
    assert requests(lambda: collect_garbage(uri, older_than=timedelta(0), endpoint_url=endpoint)) == 4
    assert requests(lambda: examine(Target.parse(uri, endpoint_url=endpoint))) == 30
    assert requests(lambda: store.put("name", b"data", Create())) == 1
    assert requests(lambda: beside.copy_from(store, store.stat("name"))) == 2
    assert requests(lambda: store.delete(f"name-{number}" for number in range(150))) == 2
    assert requests(lambda: upload(100)) == 3
    assert requests(lambda: upload(2 * _GRANULE + 100)) == 3


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("https://storage.googleapis.com", True),
        ("https://www.googleapis.com", True),
        ("https://storage.mtls.googleapis.com", True),
        ("https://private.googleapis.com", True),
        ("https://storage-xyz.p.googleapis.com", True),
        ("https://storage.me-central2.rep.googleapis.com", True),
        ("https://STORAGE.googleapis.com:443", True),
        ("https://googleapis.com.example.org", False),
        ("https://notgoogleapis.com", False),
        ("http://127.0.0.1:4443", False),
    ],
)
def test_only_googles_own_domain_is_trusted(endpoint: str, expected: bool) -> None:
    assert gcs_endpoint.is_google(endpoint) == expected


# Copies


def test_a_copy_of_an_object_that_changes_meanwhile_is_deleted_where_the_condition_is_ignored(
    fake_gcs: FakeGCS, open_gcs: Opened
) -> None:
    bucket = fake_gcs.new_bucket()
    behind = open_gcs(fake_gcs.endpoint, bucket, "one")

    def change_source(request: Request) -> Spoiling:
        if "/rewriteTo/" in request.target:
            behind.put("name", b"other", Overwrite())
        return None

    with proxied(fake_gcs.endpoint) as proxy:
        source, there = (
            open_gcs(proxy.endpoint, bucket, "one"),
            open_gcs(proxy.endpoint, bucket, "other"),
        )
        assert not there.probe().copy_source
        info = source.put("name", b"data", Overwrite())
        proxy.rule(change_source)
        assert there.copy_from(source, info) is None
        assert there.list().objects == ()
        assert source.get("name")[0] == b"other"
