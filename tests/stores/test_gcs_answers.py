"""What the GCS store makes of answers: partly received chunks, lost answers, refusals, expired tokens."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from google.auth.credentials import Credentials

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import (
    AccessDeniedError,
    ConfigurationError,
    IntegrityError,
    PreconditionFailedError,
    StorageError,
)
from cloudckpt.backends.stores.base import Create, Overwrite, Part
from cloudckpt.backends.stores.gcs.store import GCSStore
from support.gcs import GCSServer, gcs_server

_GRANULE = 256 << 10
_DATA = os.urandom(8 * _GRANULE + 100)

Opened = Callable[..., GCSStore]

_on_sessions = pytest.mark.parametrize("opened", [False], ids=["sessions"], indirect=True)
_on_both = pytest.mark.parametrize("opened", [True, False], ids=["multipart", "sessions"], indirect=True)


@pytest.fixture
def opened(request: pytest.FixtureRequest, gcs: GCSServer) -> Iterator[Opened]:
    """Open stores on one new bucket, which has the XML API unless the parameter is False."""
    bucket = gcs.new_bucket(xml=getattr(request, "param", True))
    gcs.reset()
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            GCSStore(Target.parse(f"gs://{bucket}/run", endpoint_url=gcs.endpoint, **options))
        )
    gcs.reset()


def _send(store: GCSStore, departed: Callable[[int], None] | None = None) -> tuple[Any, list[Part]]:
    upload = store.begin_upload("name")
    return upload, [store.upload_part(upload, 1, 0, [memoryview(_DATA)], departed=departed)]


@_on_sessions
@pytest.mark.parametrize("kept", [0, 100, _GRANULE, 3 * _GRANULE + 5])
def test_a_chunk_that_broke_off_is_gone_on_with_from_what_is_held(
    gcs: GCSServer, opened: Opened, kept: int
) -> None:
    store, said = opened(), list[int]()
    store.probe()
    gcs.spoil({"method": "PUT", "path": "upload_id", "do": f"keep {kept}"})
    upload, parts = _send(store, said.append)
    store.complete_upload(upload, parts)
    assert store.get("name")[0] == _DATA
    assert said[-1] == len(_DATA)
    assert gcs.faults_to_come() == 0


@_on_both
@pytest.mark.parametrize("do", ["status 503", "status 429", "status 500", "reset before", "reset after"])
@pytest.mark.parametrize("skip", range(3))
def test_any_request_of_an_upload_may_fail_once(gcs: GCSServer, opened: Opened, do: str, skip: int) -> None:
    store = opened()
    store.probe()
    gcs.spoil({"method": "P(OST|UT)", "path": "upload", "do": do, "skip": skip})
    upload, parts = _send(store)
    assert store.complete_upload(upload, parts).size == len(_DATA)
    assert store.get("name")[0] == _DATA
    assert gcs.faults_to_come() == 0
    assert list(store.pending_uploads()) == []


@pytest.mark.parametrize("do", ["status 503", "reset before", "reset after"])
def test_any_other_request_may_fail_once(gcs: GCSServer, opened: Opened, do: str) -> None:
    store = opened()
    store.put("a", b"one", Overwrite())
    gcs.spoil(
        *({"method": "GET|DELETE|POST", "path": "/o|/batch", "do": do, "skip": n} for n in (0, 1, 2, 3))
    )
    assert store.get("a")[0] == b"one"
    assert store.stat("a").size == 3
    assert [info.name for info in store.list().objects] == ["a"]
    store.delete(["a"])
    assert store.list().objects == ()


def test_a_put_whose_answer_was_lost_is_refused_as_if_another_had_won(gcs: GCSServer, opened: Opened) -> None:
    """The commit then reads back whose it is."""
    store = opened()
    assert store.capabilities.conditional_create  # probed now, so that the put below is the next one
    gcs.spoil({"method": "POST", "path": "uploadType=multipart", "do": "reset after"})
    with pytest.raises(PreconditionFailedError):
        store.put("name", b"data", Create())
    assert store.get("name")[0] == b"data"


def test_a_commit_whose_answer_was_lost_is_a_commit(gcs: GCSServer) -> None:
    uri = f"gs://{gcs.new_bucket()}/run"
    with GCSStore(Target.parse(uri, endpoint_url=gcs.endpoint)) as store:
        assert store.capabilities.conditional_create  # probed now, so that the commit is the second put
    gcs.spoil({"method": "POST", "path": "uploadType=multipart", "do": "reset after", "skip": 1})
    state = {"t": torch.arange(1000)}
    writer = cloudckpt.StorageWriter(uri, endpoint_url=gcs.endpoint)
    dcp.save(state, storage_writer=writer, no_dist=True)
    loaded = {"t": torch.zeros(1000, dtype=torch.int64)}
    reader = cloudckpt.StorageReader(uri, endpoint_url=gcs.endpoint)
    dcp.load(loaded, storage_reader=reader, no_dist=True)
    assert torch.equal(loaded["t"], state["t"])
    gcs.reset()


@_on_sessions
def test_parts_go_in_order(opened: Opened) -> None:
    store = opened()
    upload = store.begin_upload("name")
    with pytest.raises(StorageError):
        store.upload_part(upload, 2, _GRANULE, [memoryview(_DATA)[_GRANULE : 2 * _GRANULE]])


@_on_sessions
def test_a_cancelled_session_is_gone(gcs: GCSServer, opened: Opened) -> None:
    store = opened()
    upload, parts = _send(store)
    bucket = store.uri.split("/")[2]

    def held() -> list[int]:
        return [one["held"] for one in gcs.sessions() if one["bucket"] == bucket]

    assert held() == [8 * _GRANULE]
    store.abort_upload(upload)
    assert held() == []
    with pytest.raises(StorageError, match="does not exist"):
        store.complete_upload(upload, parts)


@_on_both
def test_parts_that_do_not_add_up_are_an_integrity_error(opened: Opened) -> None:
    store = opened()
    upload, (part,) = _send(store)
    for parts in ([part, part], [Part(2, part.size, part.etag)], [part, Part(2, _GRANULE)]):
        with pytest.raises(IntegrityError):
            store.complete_upload(upload, parts)
    store.complete_upload(upload, [part])


def test_a_bucket_that_is_not_there_is_named(gcs: GCSServer) -> None:
    with GCSStore(Target.parse("gs://no-such-bucket/run", endpoint_url=gcs.endpoint)) as store:
        with pytest.raises(FileNotFoundError, match="no-such-bucket"):
            store.get("name")
        with pytest.raises(StorageError, match="no-such-bucket"):
            store.begin_upload("name")


@pytest.mark.parametrize("xml", [True, False])
def test_who_pays_is_asked_and_told(gcs: GCSServer, xml: bool) -> None:
    bucket = gcs.new_bucket(xml=xml, billing={"requesterPays": True})
    store = GCSStore(Target.parse(f"gs://{bucket}/run", endpoint_url=gcs.endpoint))
    with store, pytest.raises(ConfigurationError, match="requester-pays"):
        store.put("name", b"data", Create())
    with store, pytest.raises(ConfigurationError, match="requester-pays"):
        store.begin_upload("name")
    paying = {"requester_pays": "my-project"}
    target = Target.parse(f"gs://{bucket}/run", endpoint_url=gcs.endpoint, storage_options=paying)
    with GCSStore(target) as store:
        store.put("name", b"data", Create())
        upload, parts = _send(store)
        store.complete_upload(upload, parts)
        store.delete(["name"])
        assert store.list().objects == ()


@_on_both
def test_the_storage_class_is_that_of_the_option(gcs: GCSServer, opened: Opened) -> None:
    store = opened(storage_class="NEARLINE")
    store.put("small", b"data", Create())
    upload, parts = _send(store)
    store.complete_upload(upload, parts)
    bucket = store.uri.split("/")[2]
    for name in ("small", "name"):
        assert gcs.resource(bucket, f"run/{name}")["storageClass"] == "NEARLINE"


@_on_both
def test_the_key_is_that_of_the_option(gcs: GCSServer, opened: Opened) -> None:
    key = "projects/p/locations/eu/keyRings/r/cryptoKeys/k"
    store = opened(kms_key_name=key)
    store.put("small", b"data", Create())
    upload, parts = _send(store)
    store.complete_upload(upload, parts)
    bucket = store.uri.split("/")[2]
    for name in ("small", "name"):
        assert gcs.resource(bucket, f"run/{name}")["kmsKeyName"] == f"{key}/cryptoKeyVersions/1"
    with pytest.raises(StorageError, match="Not the name of a key"):
        opened(kms_key_name="k").put("other", b"data", Create())
    with pytest.raises(StorageError, match="Not the name of a key"):
        opened(kms_key_name="k").begin_upload("other")


def test_the_environment_names_an_emulator(gcs: GCSServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.endpoint)
    with GCSStore(Target.parse(f"gs://{gcs.new_bucket()}/run")) as store:
        store.put("name", b"data", Create())
        assert store.get("name")[0] == b"data"


def test_what_gcsfs_does_not_know_is_refused(gcs: GCSServer) -> None:
    given = {"tokne": "anon"}
    with (
        GCSStore(Target.parse("gs://bucket/run", endpoint_url=gcs.endpoint, storage_options=given)) as store,
        pytest.raises(ConfigurationError, match="tokne"),
    ):
        store.stat("name")


def test_a_token_that_can_not_be_used_is_not_shown(gcs: GCSServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """gcsfs asks Google about it, by a URL that has it."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    secret = {"token": "s3cr3t-t0ken"}
    target = Target.parse("gs://bucket/run", endpoint_url=gcs.endpoint, storage_options=secret)
    with GCSStore(target) as store, pytest.raises(ConfigurationError) as caught:
        store.stat("name")
    assert "s3cr3t" not in "".join(traceback.format_exception(caught.value))


class _FromFile(Credentials):
    """Credentials whose token is renewed from a file, as a token broker's are."""

    def __init__(self, path: Path) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._path = path
        self.refresh(None)

    def refresh(self, request: object) -> None:
        del request
        self.token = self._path.read_text().strip()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GCSServer, Path]]:
    tokens = tmp_path_factory.mktemp("tokens") / "let-in"
    tokens.write_text("first\n")
    with gcs_server("--tokens", str(tokens)) as server:
        yield server, tokens


@pytest.mark.parametrize("xml", [True, False])
def test_a_token_that_expires_during_an_upload_is_renewed_and_the_upload_goes_on(
    guarded: tuple[GCSServer, Path], tmp_path: Path, xml: bool
) -> None:
    server, let_in = guarded
    given = tmp_path / "given"
    let_in.write_text("first\n")
    given.write_text("first\n")
    bucket, data = server.new_bucket(let_in.read_text().strip(), xml=xml), bytes(5 << 20) + _DATA
    credentials = {"token": _FromFile(given)}
    with GCSStore(
        Target.parse(f"gs://{bucket}/run", endpoint_url=server.endpoint, storage_options=credentials)
    ) as store:
        upload = store.begin_upload("name")
        first = store.upload_part(upload, 1, 0, [memoryview(data)[: 5 << 20]])
        let_in.write_text("second\n")
        given.write_text("second\n")
        last = store.upload_part(upload, 2, 5 << 20, [memoryview(data)[5 << 20 :]])
        store.complete_upload(upload, [first, last])
        assert store.get("name")[0] == data
        let_in.write_text("third\n")
        with pytest.raises(AccessDeniedError):
            store.get("name")
