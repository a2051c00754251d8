"""Servers that speak S3 in another way than S3: features are probed, remembered, and done without."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt import doctor
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.copy.copy import copy_checkpoint
from cloudckpt.backends.errors import (
    ConfigurationError,
    PreconditionFailedError,
    StorageError,
    UnsupportedError,
)
from cloudckpt.backends.manage.gc import collect_garbage
from cloudckpt.backends.save import save_lease
from cloudckpt.backends.save.save_lease import SaveLease
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Create, Overwrite, Update
from cloudckpt.backends.stores.s3.capabilities import TagForm, server_of
from cloudckpt.backends.stores.s3.client import Clients
from cloudckpt.backends.stores.s3.store import S3Store
from cloudckpt.backends.stores.throttle import Throttles
from support import dialects
from support.places import Place
from support.proxy import Answer, DropHeaders, LoseAnswer, Proxy, Rule, proxied
from support.servers import S3Server

NOW = timedelta(0)
ALL_SUPPORTED = (True, TagForm.QUOTED)


@pytest.fixture(scope="module", params=["moto", "ministack"])
def proxies(request: pytest.FixtureRequest, s3_server_named: Any) -> Iterator[tuple[S3Server, Proxy]]:
    server = s3_server_named(request.param)
    with proxied(server.endpoint) as proxy:
        yield server, proxy


@pytest.fixture
def proxy(proxies: tuple[S3Server, Proxy]) -> Proxy:
    proxies[1].forget()
    return proxies[1]


@pytest.fixture
def run(proxies: tuple[S3Server, Proxy], proxy: Proxy) -> Place:
    """A place in a bucket that no process has probed."""
    server = proxies[0]
    return Place.on_server(server, server.new_bucket()).behind(proxy.endpoint).child("run")


@pytest.fixture
def store(run: Place) -> Iterator[S3Store]:
    with opened(run) as found:
        yield found


def opened(place: Place) -> S3Store:
    found = open_store(Target.parse(place.uri, **{**place.options, "retries": 1}))
    assert isinstance(found, S3Store)
    return found


def state(value: float = 1.0) -> dict[str, Any]:
    return {"w": torch.full((1000,), value)}


def save(place: Place, value: float = 1.0, **options: Any) -> None:
    dcp.save(state(value), storage_writer=place.writer(**options))


def loaded(place: Place) -> float:
    found = state(0.0)
    dcp.load(found, storage_reader=place.reader())
    return float(found["w"][0])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (None, ALL_SUPPORTED),
        (dialects.rgw, (True, TagForm.UNQUOTED)),
        (dialects.no_if_match, (True, None)),
        (dialects.no_if_none_match, (False, TagForm.QUOTED)),
        (dialects.swift, (False, None)),
    ],
    ids=["as S3", "rgw", "no If-Match", "no If-None-Match", "swift"],
)
def test_conditions_are_tried_where_they_hold_and_where_they_do_not(
    store: S3Store, run: Place, proxy: Proxy, rule: Rule | None, expected: tuple[bool, TagForm | None]
) -> None:
    proxy.rule(rule)
    bucket = run.uri.split("/")[2]
    put = server_of(store._requests, bucket).put(store._requests, bucket, "run/")
    assert (put.create, put.update) == expected
    assert f"If-Match on PUT{' (entity tags without quotes)' * (rule is dialects.rgw)}" in (
        store.features() or ""
    )
    assert run.visible() == run.pending() == set()
    asked = proxy.count
    opened(run).features()
    assert proxy.count == asked, "a server is probed once a process and bucket"


@pytest.mark.parametrize(
    "rule",
    [None, dialects.rgw, dialects.no_if_match, dialects.swift],
    ids=["as S3", "rgw", "no If-Match", "swift"],
)
def test_a_checkpoint_is_overwritten(run: Place, proxy: Proxy, rule: Rule | None) -> None:
    proxy.rule(rule)
    save(run, 1.0)
    save(run, 2.0, overwrite=True)
    assert loaded(run) == 2.0
    assert len(run.visible()) == 2, "the objects of the first save are deleted"


@pytest.mark.parametrize("before", range(3))
def test_a_lost_answer_to_a_probe_is_not_taken_for_a_refusal(
    store: S3Store, proxy: Proxy, before: int
) -> None:
    proxy.spoil("PutObject", [*[None] * before, LoseAnswer()])
    able = store.capabilities
    assert (able.conditional_create, able.conditional_update) == (True, True)


def test_a_condition_that_does_not_hold_is_refused_with_tags_in_the_servers_form(
    store: S3Store, proxy: Proxy
) -> None:
    proxy.rule(dialects.rgw)
    first = store.put("name", b"first", Create())
    second = store.put("name", b"second", Update(first.version or ""))
    with pytest.raises(PreconditionFailedError):
        store.put("name", b"third", Update(first.version or ""))
    with pytest.raises(PreconditionFailedError):
        store.put("name", b"third", Create())
    data, info = store.get("name")
    assert (data, info.version) == (b"second", second.version)


def test_a_condition_that_the_server_lacks_is_refused_by_name(store: S3Store, proxy: Proxy) -> None:
    proxy.rule(dialects.swift)
    for condition in (Create(), Update("0" * 32)):
        with pytest.raises(ConfigurationError, match="does not support the condition"):
            store.put("name", b"data", condition)


@pytest.mark.parametrize(
    "rule", [dialects.rgw, dialects.no_if_match, dialects.swift], ids=["rgw", "none", "swift"]
)
def test_a_marker_is_renewed_and_gc_leaves_the_save_alone(
    store: S3Store, run: Place, proxy: Proxy, rule: Rule
) -> None:
    proxy.rule(rule)
    held = SaveLease(store, uuid.uuid4().hex, 0, every=3600)
    upload = store.begin_upload(f"__0_0.{uuid.uuid4().hex}.distcp")
    kept = held._kept
    proxy.forget()
    proxy.rule(rule)
    assert kept.renew()
    (put,) = [
        request
        for request in proxy.seen("PutObject")
        if not request.headers.get("if-match", "").startswith('"')
    ]
    assert save_lease.MARKER.search(put.target.partition("?")[0].lstrip("/"))
    collect_garbage(run.uri, older_than=NOW, **run.options)
    assert store.is_pending(upload)
    held.check()
    held.end()
    assert run.visible() == set()
    store.abort_upload(upload)


def test_a_marker_is_renewed_where_the_condition_stops_working(
    store: S3Store, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    held = SaveLease(store, uuid.uuid4().hex, 0, every=3600)
    kept = held._kept
    assert kept.renew()
    proxy.forget()
    proxy.rule(dialects.no_if_match)  # after the probe
    assert kept.renew()
    assert [("if-match" in one.headers) for one in proxy.seen("PutObject")] == [True, False]
    assert not caplog.records
    store.delete([kept.name])
    assert not kept.renew(), "one that gc deleted does not come back"
    held.leave()


def test_a_marker_that_cannot_be_renewed_is_reported(
    store: S3Store, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    held = SaveLease(store, uuid.uuid4().hex, 0, every=3600)
    assert held._kept.renew()
    proxy.spoil("PutObject", [Answer(403, "AccessDenied")])
    assert held._kept.renew(), "the next renewal may succeed"
    (record,) = caplog.records
    assert "could not be renewed" in record.message
    assert held._kept.name in record.message
    assert "600 s" in record.message
    held.end()


@pytest.mark.parametrize("rule", [dialects.rgw, dialects.swift], ids=["rgw", "swift"])
def test_a_copy_keeps_its_journal(run: Place, proxy: Proxy, rule: Rule) -> None:
    proxy.rule(rule)
    save(run.child("a"))
    destination = run.child("b")
    copy_checkpoint(*(Target.parse(one.uri, **one.options) for one in (run.child("a"), destination)))
    assert loaded(destination) == 1.0
    journals = [one for one in proxy.seen("PutObject") if one.target.endswith(".cloudckpt-copy")]
    assert journals
    assert not [name for name in destination.visible() if name.startswith(".cloudckpt")]


@pytest.mark.parametrize(
    ("rule", "refused"),
    [
        (dialects.wants_md5, 0),
        (dialects.without_delete_objects(400, "InvalidArgument"), 1),
        (dialects.without_delete_objects(405, "MethodNotAllowed"), 1),
        (dialects.without_delete_objects(501, "NotImplemented"), 1),
    ],
    ids=["wants Content-MD5", "400", "405", "501"],
)
def test_objects_are_deleted_whatever_the_server_takes_for_it(
    store: S3Store, run: Place, proxy: Proxy, rule: Rule, refused: int
) -> None:
    for name in ("a", "b", "c/d"):
        store.put(name, b"data", Overwrite())
    proxy.rule(rule)
    store.delete(["a", "b"])
    assert run.visible() == {"c/d"}
    store.delete(["c/d", "not there"])
    with opened(run) as another:
        another.put("e", b"data", Overwrite())
        another.delete(["e"])
    assert run.visible() == set()
    batches = proxy.seen("DeleteObjects")
    assert len(batches) == (refused or 3), "what a server refuses is remembered for the process"


def test_a_deletion_that_is_denied_is_not_tried_in_another_way(store: S3Store, proxy: Proxy) -> None:
    proxy.spoil("DeleteObjects", [Answer(403, "AccessDenied")])
    with pytest.raises(PermissionError):
        store.delete(["name"])
    assert not proxy.seen("DeleteObject")


def test_s3_itself_is_sent_no_content_md5_with_deletions() -> None:
    headers: list[Any] = []

    def stop(request: Any, **_: Any) -> None:
        headers.append(request.headers)
        raise ConnectionError

    for endpoint in (None, "http://127.0.0.1:9"):
        target = Target.parse(
            "s3://bucket",
            endpoint_url=endpoint,
            region="us-east-1",
            storage_options={"key": "k", "secret": "s"},
        )
        clients = Clients(target, Throttles.of(1))
        clients.data.meta.events.register("before-send.s3.DeleteObjects", stop)
        with pytest.raises(ConnectionError):
            clients.data.delete_objects(Bucket="bucket", Delete={"Objects": [{"Key": "key"}]})
    aws, other = headers
    assert ("Content-MD5" in aws, "Content-MD5" in other) == (False, True)
    assert "x-amz-checksum-crc32" in aws
    assert "x-amz-checksum-crc32" in other


@pytest.mark.parametrize("checksum", ["auto", "crc64nvme", "crc32c"])
def test_a_bucket_that_demands_checksums_is_saved_to_and_cleaned_up(
    run: Place, proxy: Proxy, checksum: str
) -> None:
    proxy.rule(dialects.object_lock)
    options: dict[str, Any] = {**run.options, "checksum": checksum}
    with cloudckpt.Checkpointer(run.uri, keep_last=1, progress=False, **options) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(step))
        assert checkpointer.all_steps() == [2]
        found = state(0.0)
        checkpointer.load(found)
    assert float(found["w"][0]) == 2.0
    assert not [name for name in run.visible() if ".cloudckpt" in name]


def test_a_bucket_that_demands_content_md5_alone_is_saved_to(run: Place, proxy: Proxy) -> None:
    proxy.rule(dialects.md5_alone)
    save(run, 1.0)
    save(run, 2.0, overwrite=True)
    assert loaded(run) == 2.0
    assert all("content-md5" in one.headers for one in proxy.seen("UploadPart"))


def test_gc_goes_on_where_a_gateway_answers_with_a_page(run: Place, proxy: Proxy) -> None:
    with opened(run) as store:
        store.put(f"__0_0.{uuid.uuid4().hex}.distcp", b"data", Overwrite())
    proxy.rule(dialects.pages_for_uploads)
    found = collect_garbage(run.uri, older_than=NOW, silent_for=NOW, **run.options)
    assert (len(found.objects), len(found.skipped)) == (1, 1)


@pytest.mark.parametrize("operation", ["ListMultipartUploads", "AbortMultipartUpload"])
def test_doctor_does_not_advise_gc_where_it_finds_no_uploads(
    run: Place, proxy: Proxy, operation: str
) -> None:
    proxy.rule(dialects.without(operation))
    found = {one.check: one for one in doctor.examine(Target.parse(run.uri, **run.options))}
    assert found["lifecycle"].advice == "Add a lifecycle rule with AbortIncompleteMultipartUpload"
    assert not [one for one in found.values() if one.state == "failed"]


@pytest.mark.parametrize("status", [405, 501])
def test_gc_goes_on_where_uploads_are_not_listed(run: Place, proxy: Proxy, status: int) -> None:
    with opened(run) as store:
        dead = f".cloudckpt-save.{uuid.uuid4().hex}"
        store.put(dead, b"{}", Overwrite())
        store.put(f"__0_0.{uuid.uuid4().hex}.distcp", b"data", Overwrite())
        proxy.rule(dialects.without("ListMultipartUploads", status))
        with pytest.raises(UnsupportedError, match="ListMultipartUploads"):
            list(store.pending_uploads())
    found = collect_garbage(run.uri, older_than=NOW, silent_for=NOW, **run.options)
    assert run.visible() == set()
    (skipped,) = found.skipped
    assert "ListMultipartUploads" in skipped and str(status) in skipped
    assert (found.traces, len(found.objects)) == ((dead,), 1)


def test_gc_goes_on_where_uploads_are_not_aborted(run: Place, proxy: Proxy) -> None:
    with opened(run) as store:
        name = f"__0_0.{uuid.uuid4().hex}.distcp"
        upload = store.begin_upload(name)
        store.put(f"__0_1.{uuid.uuid4().hex}.distcp", b"data", Overwrite())
        proxy.rule(dialects.without("AbortMultipartUpload"))
        found = collect_garbage(run.uri, older_than=NOW, silent_for=NOW, **run.options)
        assert (found.uploads, len(found.objects)) == ((), 1)
        assert len(found.skipped) == 1 and name in found.skipped[0]
        proxy.rule(None)
        store.abort_upload(upload)


@pytest.mark.parametrize("operation", ["PutObject", "GetObject", "HeadObject", "UploadPart"])
def test_an_answer_without_an_etag_is_named_as_that(store: S3Store, proxy: Proxy, operation: str) -> None:
    store.put("name", b"data", Overwrite())
    upload = store.begin_upload("other")
    acts: dict[str, Callable[[], object]] = {
        "PutObject": lambda: store.put("name", b"data", Overwrite()),
        "GetObject": lambda: store.get("name"),
        "HeadObject": lambda: store.stat("name"),
        "UploadPart": lambda: store.upload_part(upload, 1, 0, [memoryview(b"data")]),
    }
    proxy.spoil(operation, [DropHeaders(("etag",))])
    with pytest.raises(StorageError, match=f"answered {operation} without an ETag") as caught:
        acts[operation]()
    assert caught.value.hint
    store.abort_upload(upload)


def test_a_copy_of_another_version_is_refused_also_where_the_condition_is_ignored(
    run: Place, proxies: tuple[S3Server, Proxy]
) -> None:
    with opened(run.child("a")) as source, opened(run.child("b")) as destination:
        info = source.put("name", b"first", Overwrite())
        assert destination.copy_from(source, info) is not None
        source.put("name", b"second", Overwrite())
        destination.delete(["name"])
        assert destination.copy_from(source, info) is None
        assert not destination.holds("name")
