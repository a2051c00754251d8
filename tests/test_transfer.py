"""A copy is all of a checkpoint or nothing, between any two stores, and goes on where it was cut off."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.copy import copy_workers, journal
from cloudckpt.backends.copy.copy_checksums import ObjectChecks, checks_of
from cloudckpt.backends.copy.journal import JOURNAL_NAME
from cloudckpt.backends.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CommitError,
    ConfigurationError,
    IntegrityError,
    StorageError,
    UnsafeCheckpointError,
)
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.manage import gc
from cloudckpt.backends.save import commit
from cloudckpt.backends.save.save_lease import SaveLease, marker_name
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import ObjectStore, Part, Upload
from cloudckpt.backends.stores.gcs.store import GCSStore
from cloudckpt.backends.stores.local.store import LocalStore
from cloudckpt.backends.stores.memory import MemoryStore
from cloudckpt.backends.stores.object_names import PROBE, PROBE_PREFIX
from cloudckpt.backends.stores.s3 import copy as s3_copy
from cloudckpt.backends.stores.s3.store import S3Store
from support.copies import (
    STATE,
    arrived,
    assert_same,
    copied,
    data_of,
    flip,
    journalled,
    saved,
    shows_nothing,
)
from support.hostile import pickles
from support.places import FOLDER, GCS, Place, Places, new_place
from support.proxy import Answer, LoseAnswer, proxied
from support.servers import S3Server

KINDS = (FOLDER, "moto", GCS)
STORES: tuple[type[ObjectStore], ...] = (LocalStore, S3Store, GCSStore, MemoryStore)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, s3_server_named: Callable[[str], S3Server]) -> Places:
    folder = tmp_path_factory.mktemp("places")
    return lambda name: new_place(name, folder, s3_server_named)


@pytest.fixture(scope="module")
def sources(places: Places) -> dict[str, Place]:
    """The same checkpoint on every store."""
    return {kind: saved(places(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def source(sources: dict[str, Place]) -> Place:
    return sources[FOLDER]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, places: Places) -> Place:
    """An untouched place on every store in turn."""
    return places(request.param)


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No store copies itself."""
    for store in STORES:
        monkeypatch.setattr(store, "copy_from", lambda *_: None)


def size_of(place: Place) -> int:
    return sum(len(place.read(name)) for name in data_of(place))


# Between any two stores


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_arrives_bit_by_bit_on_any_other_store(
    sources: dict[str, Place], kind: str, place: Place
) -> None:
    there, size = sources[kind], size_of(sources[kind])
    result = copied(there, place)
    assert (result.source, result.uri) == (there.uri, place.uri)
    assert (result.objects, result.size, result.was_there) == (len(data_of(there)), size, False)
    assert (result.sent, result.copied_by_store) == ((0, size) if there.name == place.name else (size, 0))
    assert_same(there, place)
    again = copied(there, place)
    assert (again.was_there, again.sent, again.copied_by_store) == (True, 0, 0)


@pytest.mark.usefixtures("streamed")
def test_a_checkpoint_arrives_within_one_store_that_does_not_copy(
    sources: dict[str, Place], place: Place
) -> None:
    assert copied(sources[place.name], place).copied_by_store == 0
    assert_same(sources[place.name], place)


@pytest.mark.parametrize("part_size", [1, 99_999, 1 << 30])
def test_parts_of_any_size_and_any_number_at_a_time(source: Place, part_size: int) -> None:
    small = {"x": torch.arange(300.0), "epoch": 1} if part_size == 1 else STATE
    there = source if part_size > 1 else saved(source.child("small"), small)
    uri = f"memory://{uuid.uuid4().hex}/run"
    cloudckpt.copy_checkpoint(there.uri, uri, destination_options={"part_size": part_size, "concurrency": 3})
    assert cloudckpt.verify(uri).ok


def test_memory_in_use_stays_below_its_limit(source: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    held, most, lock = 0, 0, threading.Lock()
    read, send = LocalStore.read_into, MemoryStore.upload_part

    def reading(self: LocalStore, name: str, offset: int, buffers: Any, **more: Any) -> int:
        nonlocal held, most
        with lock:
            held += sum(one.nbytes for one in buffers)
            most = max(most, held)
        return read(self, name, offset, buffers, **more)

    def sending(self: MemoryStore, *args: Any, **more: Any) -> Part:
        nonlocal held
        part = send(self, *args, **more)
        with lock:
            held -= part.size
        return part

    monkeypatch.setattr(LocalStore, "read_into", reading)
    monkeypatch.setattr(MemoryStore, "upload_part", sending)
    options = {"part_size": 300_000, "memory_limit": 1 << 20, "concurrency": 16}
    cloudckpt.copy_checkpoint(source.uri, f"memory://{uuid.uuid4().hex}", destination_options=options)
    assert 300_000 < most <= 1 << 20


def test_stock_checkpoints_are_copied_too(place: Place, tmp_path: Path) -> None:
    stock = Place.in_folder(tmp_path / "stock")
    dcp.save(STATE, storage_writer=stock.stock_writer())
    copied(stock, place)
    assert_same(stock, place)


def test_metadata_of_each_rank_is_copied_where_there_is_none_of_all(place: Place, tmp_path: Path) -> None:
    alone = Place.in_folder(tmp_path / "alone")
    dcp.save({"x": torch.arange(4.0)}, storage_writer=alone.writer(), use_collectives=False)
    assert "__0.metadata" in alone.visible()
    copied(alone, place)
    assert {name: place.read(name) for name in place.visible()} == {
        name: alone.read(name) for name in alone.visible()
    }
    assert copied(alone, place).was_there


def test_metadata_of_each_rank_takes_the_place_of_that_of_all(source: Place, tmp_path: Path) -> None:
    alone, there = Place.in_folder(tmp_path / "alone"), Place.in_folder(tmp_path / "there")
    dcp.save({"x": torch.arange(4.0)}, storage_writer=alone.writer(), use_collectives=False)
    copied(source, there)
    copied(alone, there, overwrite=True)
    assert there.visible() == alone.visible()
    copied(source, there, overwrite=True)
    assert_same(source, there)


# By the store itself


def test_within_s3_no_byte_comes_by(
    sources: dict[str, Place], places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = sources["moto"]
    assert isinstance(there.server, S3Server)
    with proxied(there.server.endpoint) as proxy:
        options = {**there.options, "endpoint_url": proxy.endpoint, "storage_class": "STANDARD_IA"}
        for largest, part, operation in ((1 << 30, 1 << 30, "PutObject"), (1 << 20, 6 << 20, "UploadPart")):
            monkeypatch.setattr(s3_copy, "LARGEST", largest)
            monkeypatch.setattr(s3_copy, "_PART", part)
            proxy.forget()
            to = places("moto")
            cloudckpt.copy_checkpoint(there.uri, to.uri, source_options=options, destination_options=options)
            copies = [one for one in proxy.seen(operation) if "x-amz-copy-source" in one.headers]
            made = [one for one in copies if not PROBE.search(one.target)]
            assert len(made) == (1 if operation == "PutObject" else 2)
            assert all(not one.body for one in made)
            assert not [one for one in proxy.seen("GetObject") if "range" in one.headers]
            assert_same(there, to)
            client = there.server.client()
            bucket, _, key = to.uri.removeprefix("s3://").partition("/")
            head = client.head_object(Bucket=bucket, Key=f"{key}/{data_of(to)[0]}")
            assert head["StorageClass"] == "STANDARD_IA"


def test_where_s3_denies_a_copy_the_bytes_are_sent(sources: dict[str, Place], places: Places) -> None:
    there, to = sources["moto"], places("moto")
    assert there.server is not None
    with proxied(there.server.endpoint) as proxy:
        proxy.rule(lambda one: Answer(403, "AccessDenied") if "x-amz-copy-source" in one.headers else None)
        options = {**there.options, "endpoint_url": proxy.endpoint}
        result = cloudckpt.copy_checkpoint(
            there.uri, to.uri, source_options=options, destination_options=options
        )
    assert (result.copied_by_store, result.sent) == (0, size_of(there))
    assert_same(there, to)


def test_within_gcs_no_byte_comes_by(places: Places) -> None:
    state = {"x": torch.arange(5_000_000.0)}  # more than the server copies at once
    there, to = saved(places(GCS), state), places(GCS)
    with proxied(there.options["endpoint_url"]) as proxy:
        options = {**there.options, "endpoint_url": proxy.endpoint, "storage_class": "NEARLINE"}
        result = cloudckpt.copy_checkpoint(
            there.uri, to.uri, source_options=options, destination_options=options
        )
        assert result.copied_by_store == size_of(there)
        assert not [one for one in proxy.seen("UploadPart") if PROBE_PREFIX not in one.target]
        calls = [one for one in proxy.seen("CopyObject") if PROBE_PREFIX not in one.target]
        assert len(calls) == 3
    assert_same(there, to, state)


def test_a_folder_is_copied_by_the_kernel_and_shown_in_one_step(source: Place, tmp_path: Path) -> None:
    to = Place.in_folder(tmp_path / "copy")
    assert copied(source, to).copied_by_store == size_of(source)
    assert not [name for name in to.visible() if name.endswith(".partial")]


def test_what_changes_at_the_source_while_it_is_copied_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, to = saved(Place.in_folder(tmp_path / "there")), Place.in_folder(tmp_path / "to")
    copy = LocalStore.copy_from

    def changed(self: LocalStore, one: ObjectStore, info: Any) -> Any:
        made = copy(self, one, info)
        flip(there, info.name, 100)
        return made

    monkeypatch.setattr(LocalStore, "copy_from", changed)
    with pytest.raises(IntegrityError, match="changed or deleted while it was copied"):
        copied(there, to)
    assert shows_nothing(to)


# Integrity


@pytest.mark.parametrize("across", [False, True], ids=["in a part", "across two parts"])
def test_a_flipped_byte_at_the_source_is_named_and_nothing_is_committed(
    place: Place, tmp_path: Path, across: bool
) -> None:
    there = saved(Place.in_folder(tmp_path / "damaged"))
    (name,) = data_of(there)
    at = (5 << 20) - 1 if across else 1 << 20  # the border of S3's parts, and of the twentieth elsewhere
    flip(there, name, at)
    to = (
        place
        if place.name != FOLDER
        else Place(FOLDER, f"memory://{uuid.uuid4().hex}", options=place.options)
    )
    with pytest.raises(IntegrityError, match="'large' is damaged: bytes") as caught:
        copied(there, to)
    assert (caught.value.uri, caught.value.object_name) == (there.uri, name)
    start, stop = (int(word) for word in caught.value.message.split("bytes ")[1].split()[:3:2])
    assert start <= at < stop
    if to is place:
        assert shows_nothing(place)
        assert {JOURNAL_NAME} == place.visible()
        assert place.pending() == set()


@pytest.mark.parametrize("what", ["missing", "short"])
def test_an_object_that_is_missing_or_short_is_named_before_anything_is_sent(
    tmp_path: Path, what: str
) -> None:
    there, to = saved(Place.in_folder(tmp_path / "there")), Place.in_folder(tmp_path / "to")
    (name,) = data_of(there)
    there.write(name, there.read(name)[:-1]) if what == "short" else there.remove(name)
    with pytest.raises(IntegrityError, match="a data object is damaged") as caught:
        copied(there, to)
    assert caught.value.object_name == name
    assert to.visible() == set()


def test_hostile_metadata_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    there, to = Place.in_folder(tmp_path / "there"), Place.in_folder(tmp_path / "to")
    (tmp_path / "there").mkdir()
    for data in list(pickles().values())[::20]:
        there.write(md.METADATA_NAME, data)
        with pytest.raises((UnsafeCheckpointError, IntegrityError)):
            copied(there, to)
    assert to.visible() == set()


@pytest.mark.parametrize(
    "name",
    [".metadata", "__1.metadata", "a/.metadata", ".cloudckpt-copy", "a//b", "./a", "x/.hidden/y", "../out"],
)
def test_names_that_are_no_data_objects_are_refused(tmp_path: Path, name: str) -> None:
    there, to = saved(Place.in_folder(tmp_path / "there")), Place.in_folder(tmp_path / "to")
    metadata = md.load(there.read(md.METADATA_NAME), uri=there.uri)
    for info in metadata.storage_data.values():
        info.relative_path = name
    there.write(md.METADATA_NAME, md.dump(metadata))
    with pytest.raises((UnsafeCheckpointError, IntegrityError)):
        copied(there, to)
    assert not (tmp_path / "to").exists()


# What is there already


def test_another_checkpoint_is_replaced_only_when_asked(source: Place, place: Place) -> None:
    other = {**STATE, "epoch": 4}
    saved(place, other)
    before = place.visible()
    with pytest.raises(CheckpointExistsError, match="another checkpoint is committed here already"):
        copied(source, place)
    assert place.visible() == before
    copied(source, place, overwrite=True)
    assert_same(source, place)


def test_stock_objects_of_the_same_names_are_not_replaced_under_a_checkpoint(tmp_path: Path) -> None:
    there, to = Place.in_folder(tmp_path / "there"), Place.in_folder(tmp_path / "to")
    dcp.save(STATE, storage_writer=there.stock_writer())
    dcp.save({"x": torch.ones(3)}, storage_writer=to.stock_writer())
    before = {name: to.read(name) for name in to.visible()}
    with pytest.raises(CheckpointExistsError, match="of the same names"):
        copied(there, to, overwrite=True)
    assert {name: to.read(name) for name in to.visible()} == before


def test_a_stray_object_of_a_stock_name_is_not_taken_for_the_one_to_copy(
    place: Place, tmp_path: Path
) -> None:
    stock = Place.in_folder(tmp_path / "stock")
    dcp.save(STATE, storage_writer=stock.stock_writer())
    (name,) = data_of(stock)
    (tmp_path / "folder").mkdir()
    saved(place)
    place.write(name, bytes(len(stock.read(name))))
    for one in (md.METADATA_NAME, *data_of(place)):
        place.remove(one)
    copied(stock, place)
    assert_same(stock, place)


@pytest.mark.parametrize(("first", "second"), [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a", "c/../a")])
def test_one_place_does_not_lie_in_the_other(tmp_path: Path, first: str, second: str) -> None:
    saved(Place.in_folder(tmp_path / "a"))
    with pytest.raises(ConfigurationError, match="neither may lie in the other"):
        cloudckpt.copy_checkpoint(f"{tmp_path}/{first}", f"{tmp_path}/{second}")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(ConfigurationError):
        cloudckpt.copy_checkpoint(tmp_path / "a", tmp_path / "link" / "b")


def test_a_source_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint to copy"):
        cloudckpt.copy_checkpoint(tmp_path / "none", tmp_path / "to")
    assert not (tmp_path / "to").exists()


# Cut off, and gone on with


class Cut(StorageError):
    """What ends a copy in these tests."""


def cut_after(count: int, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Have every store fail after so many parts, until the patch is undone."""
    left = iter(range(count))
    for store in STORES:
        send = store.upload_part

        def failing(*args: Any, _send: Callable[..., Part] = send, **more: Any) -> Part:
            if next(left, None) is None:
                raise Cut("cut off")
            return _send(*args, **more)

        monkeypatch.setattr(store, "upload_part", failing)
    return monkeypatch


def cut_off(source: Place, place: Place, parts: int, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cut_after(parts, patch)
        with pytest.raises(Cut) as caught:
            copied(source, place, concurrency=1, **options)
    assert "goes on from it" in caught.value.__notes__[0]
    assert shows_nothing(place)


@pytest.mark.usefixtures("streamed")
def test_what_has_arrived_is_not_sent_again(source: Place, place: Place) -> None:
    part = place.options["part_size"]
    parts = 1 if part > 1 << 20 else 10
    cut_off(source, place, parts)
    assert arrived(place) == parts * part
    result = copied(source, place)
    assert result.sent == size_of(source) - parts * part
    assert_same(source, place)


@pytest.mark.usefixtures("streamed")
def test_it_goes_on_with_the_parts_that_there_are_whatever_the_options_say_now(
    source: Place, tmp_path: Path
) -> None:
    to = Place.in_folder(tmp_path / "to")
    cut_off(source, to, 10)
    assert copied(source, to, part_size=1 << 20).sent == size_of(source) - 10 * to.options["part_size"]
    assert_same(source, to)


@pytest.mark.usefixtures("streamed")
def test_an_upload_that_the_store_forgot_is_begun_anew(source: Place, place: Place) -> None:
    cut_off(source, place, 1)
    ((name, entry),) = journalled(place).items()
    with open_store(Target.parse(place.uri, **place.options)) as store:
        store.abort_upload(Upload(name, entry["upload_id"]))
    assert copied(source, place).sent == size_of(source)
    assert_same(source, place)


@pytest.mark.usefixtures("streamed")
def test_an_object_of_a_stock_name_that_has_arrived_is_not_sent_again(place: Place, tmp_path: Path) -> None:
    stock = Place.in_folder(tmp_path / "stock")
    state = {f"t{number}": torch.full((200_000,), float(number)) for number in range(4)}
    dcp.save(state, storage_writer=stock.stock_writer(thread_count=2))
    assert len(data_of(stock)) == 2
    first = len(stock.read(data_of(stock)[0]))
    part = min(place.options["part_size"], first)
    cut_off(stock, place, -(-first // part))
    assert arrived(place) >= first
    assert copied(stock, place).sent <= size_of(stock) - first
    assert_same(stock, place, state)


@pytest.mark.usefixtures("streamed")
def test_the_journal_of_another_checkpoint_is_discarded_with_its_uploads(source: Place, place: Place) -> None:
    cut_off(source, place, 1)
    other = saved(source.child(f"other-{uuid.uuid4().hex}"), {**STATE, "epoch": 4})
    copied(other, place)
    assert_same(other, place, {**STATE, "epoch": 4})


@pytest.mark.usefixtures("streamed")
def test_a_copy_that_died_right_after_its_commit_is_tidied_up(
    source: Place, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(journal.CopyJournal, "end", lambda self: self._stop())
        patch.setattr("cloudckpt.backends.save.save_lease.SaveLease.end", lambda self: self.leave())
        copied(source, place)
    assert len(place.visible()) == 4
    assert copied(source, place).was_there
    assert_same(source, place)


HOSTILE: dict[str, Any] = {
    "no JSON": b"\x80\x04.",
    "another form": b'{"format": 2}',
    "a list": b"[]",
    "a marker elsewhere": {"copy": "../../0123456789abcdef0123456789"},
    "a name outside": {"objects": {"../../out": {"size": 1, "version": None, "upload_id": "0" * 32}}},
    "an upload elsewhere": {"upload_id": "http://127.0.0.1:9/upload/storage/v1/b/x/o?upload_id=1"},
    "an upload by a path": {"upload_id": "../../../x"},
    "parts that never were": {"part_size": 1 << 18, "parts": "all"},
    "parts of no size": {"part_size": 0},
    "huge parts": {"part_size": 1 << 61},
    "negative parts": {"part_size": -5},
}


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("kind", [FOLDER, GCS])
def test_a_hostile_journal_does_no_harm(source: Place, places: Places, kind: str, case: Any) -> None:
    place = places(kind)
    cut_off(source, place, 1)
    journal = json.loads(place.read(JOURNAL_NAME))
    if isinstance(case, dict):
        ((_, entry),) = journal["objects"].items()
        if case.get("parts") == "all":
            edges = [[0, 1, 2**70]]
            entry["parts"] = [
                {
                    "part": {"number": number, "size": 1 << 18, "etag": "", "checksum": None},
                    "checksum": "crc32c:AAAA",
                }
                | {"edges": edges}
                for number in range(-1, 100)
            ]
        entry |= {name: value for name, value in case.items() if name in ("upload_id", "part_size")}
        journal |= {name: value for name, value in case.items() if name in ("copy", "objects")}
        place.write(JOURNAL_NAME, json.dumps(journal).encode())
    else:
        place.write(JOURNAL_NAME, case)
    copied(source, place)
    for name in {md.METADATA_NAME, *data_of(source)}:
        assert place.read(name) == source.read(name)
    assert JOURNAL_NAME not in place.visible()


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("kind", [FOLDER, "moto"])
def test_a_journal_that_lies_plausibly_fails_once(source: Place, places: Places, kind: str) -> None:
    place = places(kind)
    cut_off(source, place, 1)
    journal = json.loads(place.read(JOURNAL_NAME))
    ((_, entry),) = journal["objects"].items()
    (first,) = entry["parts"]
    second = json.loads(json.dumps(first))
    size = entry["part_size"]
    last = min(size, size_of(source) - size)
    second["part"] |= {"number": 2, "size": last, "etag": '"' + "0" * 32 + '"'}
    second["edges"] = [
        [start, count, 0] for start, count in sorted(checks_at(source).edges(size, size + last))
    ]
    entry["parts"] = [first, second]
    place.write(JOURNAL_NAME, json.dumps(journal).encode())
    with pytest.raises(CheckpointError):
        copied(source, place)
    assert shows_nothing(place)
    copied(source, place)
    assert_same(source, place)


def checks_at(place: Place) -> ObjectChecks:
    (checks,) = checks_of([md.load(place.read(md.METADATA_NAME), uri=place.uri)], place.uri).values()
    return checks


# Two at a time


def test_of_two_copies_of_one_checkpoint_one_goes_on(
    source: Place, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that began first is as good as dead once the other has begun."""
    began, go_on = threading.Event(), threading.Event()
    send = copy_workers.Relay._send_part

    def held(self: copy_workers.Relay, *args: Any) -> None:
        if not began.is_set():
            began.set()
            assert go_on.wait(60)
        send(self, *args)

    monkeypatch.setattr(copy_workers.Relay, "_send_part", held)
    for store in STORES:
        monkeypatch.setattr(store, "copy_from", lambda *_: None)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(copied, source, place)
        assert began.wait(60)
        copied(source, place)
        go_on.set()
        with pytest.raises(CommitError, match="another copy to the same place took over"):
            slow.result()
    assert_same(source, place)


def test_of_copies_that_commit_at_one_moment_one_wins(
    source: Place, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of different checkpoints, both of which have looked for their marker and found it."""
    other = saved(source.child(f"other-{uuid.uuid4().hex}"), {**STATE, "epoch": 4})
    meet, put = threading.Barrier(2), commit.put_metadata

    def together(*args: Any) -> None:
        meet.wait(60)
        put(*args)

    monkeypatch.setattr(commit, "put_metadata", together)

    def outcome(one: Place) -> CheckpointError | None:
        try:
            copied(one, place)
        except CheckpointError as error:
            meet.abort()
            return error
        return None

    monkeypatch.setattr("cloudckpt.backends.save.save_lease.SaveLease.is_there", lambda _: True)
    monkeypatch.setattr(journal.CopyJournal, "check", lambda _: None)
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(outcome, (source, other)))
    lost = [one for one in outcomes if one is not None]
    assert len(lost) == 1
    assert type(lost[0]) in (CheckpointExistsError, CommitError)
    won = source if outcomes[0] is None else other
    assert place.read(md.METADATA_NAME) == won.read(md.METADATA_NAME)
    assert cloudckpt.verify(place.uri, **place.options).ok


def stock_places(tmp_path: Path) -> tuple[Place, Place, Place]:
    """Two checkpoints whose objects have the same names and sizes, and an untouched place."""
    first, second = Place.in_folder(tmp_path / "first"), Place.in_folder(tmp_path / "second")
    for epoch, one in enumerate((first, second)):
        dcp.save({**STATE, "epoch": epoch}, storage_writer=one.stock_writer())
    return first, second, Place.in_folder(tmp_path / "to")


def test_what_another_copy_committed_before_it_heard_of_this_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, to = stock_places(tmp_path)
    begin = journal.CopyJournal.__init__

    def late(self: journal.CopyJournal, *args: Any) -> None:
        monkeypatch.setattr(journal.CopyJournal, "__init__", begin)
        copied(first, to)
        begin(self, *args)

    monkeypatch.setattr(journal.CopyJournal, "__init__", late)
    with pytest.raises(CheckpointExistsError):
        copied(second, to)
    assert_same(first, to, {**STATE, "epoch": 0})


@pytest.mark.usefixtures("streamed")
def test_an_object_of_another_checkpoint_that_came_first_is_not_taken_for_the_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, to = stock_places(tmp_path)
    complete = LocalStore.complete_upload

    def beaten(self: LocalStore, upload: Upload, *args: Any, **more: Any) -> Any:
        monkeypatch.setattr(LocalStore, "complete_upload", complete)
        to.write(upload.name, second.read(upload.name))
        return complete(self, upload, *args, **more)

    monkeypatch.setattr(LocalStore, "complete_upload", beaten)
    copied(first, to)
    assert_same(first, to, {**STATE, "epoch": 0})


def test_an_object_that_another_copy_puts_late_is_missed_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, to = stock_places(tmp_path)
    copy = copy_workers.Relay.copy

    def beaten(self: copy_workers.Relay, originals: Any) -> None:
        copy(self, originals)
        (name,) = data_of(second)
        to.write(name, second.read(name))

    monkeypatch.setattr(copy_workers.Relay, "copy", beaten)
    with pytest.raises(CommitError, match="is another one"):
        copied(first, to)
    assert shows_nothing(to)


def test_a_copy_whose_marker_is_gone_commits_nothing(
    source: Place, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copy_workers.Relay.copy

    def collected(self: copy_workers.Relay, originals: Any) -> None:
        copy(self, originals)
        for name in place.visible():
            if name.startswith(marker_name("")):
                place.remove(name)

    monkeypatch.setattr(copy_workers.Relay, "copy", collected)
    with pytest.raises(CommitError, match="took this one for dead"):
        copied(source, place)
    assert shows_nothing(place)


def test_a_commit_whose_answer_is_lost_is_found_again(source: Place, places: Places) -> None:
    to = places("moto")
    assert to.server is not None
    with proxied(to.server.endpoint) as proxy:
        proxy.rule(
            lambda one: LoseAnswer() if one.method == "PUT" and one.target.endswith("/.metadata") else None
        )
        copied(source, to, endpoint_url=proxy.endpoint, retries=0, timeout=5)
    assert_same(source, to)


# Garbage


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_gc_takes_away_what_a_dead_copy_left(place: Place, tmp_path: Path, stock: bool) -> None:
    there = Place.in_folder(tmp_path / "there")
    state = {f"t{number}": torch.full((200_000,), float(number)) for number in range(4)}
    if stock:
        dcp.save(state, storage_writer=there.stock_writer(thread_count=2))
    else:
        saved(there)
    kept = saved(place.child("step-0000000001"))
    to = place.child("step-0000000002")
    cut_off(there, to, 8 if place.options["part_size"] < 1 << 20 else 1)
    young = cloudckpt.collect_garbage(place.uri, dry_run=True, **place.options)
    assert not (young.objects or young.traces)  # by moto's account every upload is years old
    now = timedelta(0)
    found = cloudckpt.collect_garbage(place.uri, older_than=now, dry_run=True, **place.options)
    assert found.traces == (f"step-0000000002/{JOURNAL_NAME}",)
    assert found == cloudckpt.collect_garbage(place.uri, older_than=now, **place.options)
    assert place.visible() == {f"step-0000000001/{name}" for name in kept.visible()}
    assert place.pending() == set()
    assert cloudckpt.verify(kept.uri, **place.options).ok


@pytest.mark.usefixtures("streamed")
def test_gc_leaves_alone_what_a_copy_goes_on_with_that_begins_meanwhile(
    source: Place, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has listed what is old before the copy puts its marker, and is about to delete it."""
    cut_off(source, place, 1)
    unnamed, meanwhile = gc._unnamed, list[Any]()

    def beginning(*args: Any) -> Any:
        found = unnamed(*args)
        if not meanwhile:
            meanwhile.append(place)
            with open_store(Target.parse(place.uri, **place.options)) as store:
                meanwhile.append(SaveLease(store, "0" * 32, 0))
        return found

    monkeypatch.setattr(gc, "_unnamed", beginning)
    before = {JOURNAL_NAME, *(name for name in place.visible() if name.endswith(".partial"))}
    found = cloudckpt.collect_garbage(place.uri, older_than=timedelta(0), **place.options)
    assert not (found.uploads or found.objects or found.traces)
    assert place.visible() == before | {marker_name("0" * 32)}
    meanwhile[1].end()
    assert copied(source, place).sent == size_of(source) - place.options["part_size"]
    assert_same(source, place)


def test_what_goes_away_before_the_commit_is_missed(
    source: Place, folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copy_workers.Relay.copy

    def losing(self: copy_workers.Relay, originals: Any) -> None:
        copy(self, originals)
        folder.remove(data_of(source)[0])

    monkeypatch.setattr(copy_workers.Relay, "copy", losing)
    with pytest.raises(CommitError, match="had arrived"):
        copied(source, folder)
    assert shows_nothing(folder)


def test_gc_leaves_a_copy_in_progress_alone(
    source: Place, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copy_workers.Relay.copy

    def collecting(self: copy_workers.Relay, originals: Any) -> None:
        copy(self, originals)
        found = cloudckpt.collect_garbage(place.uri, older_than=timedelta(0), **place.options)
        assert not (found.uploads or found.objects or found.traces)

    monkeypatch.setattr(copy_workers.Relay, "copy", collecting)
    copied(source, place)
    assert_same(source, place)
