"""Transient errors between the ranks and the store: saves and loads succeed, and are whole."""

from __future__ import annotations

import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import AccessDeniedError
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Overwrite
from support import states
from support.crash import committed
from support.gcs import GCSServer
from support.places import GCS, S3_PART_SIZE, Place
from support.proxy import Answer, LoseAnswer, Proxy, Request, Spoiling, proxied
from support.ranks import RankPool, RankPools
from support.servers import S3Server
from support.transient_errors import KINDS, Busy, TransientErrors

RANKS = 2
SHARE = 0.2
SECONDS = 1.0
"""The option timeout: what a black hole costs, ten times as much where an upload is completed."""
SOAK_SECONDS = 2.0
MANY_PARTS = 24
CALL_SECONDS = 300.0


ServerNamed = Callable[[str], "S3Server | GCSServer"]


@dataclass(frozen=True, slots=True)
class Faulty:
    """A server with a proxy before it, and a place there that is reached through the proxy."""

    proxy: Proxy
    place: Place


def under(server: S3Server | GCSServer, proxy: Proxy, timeout: float = SECONDS) -> Faulty:
    """Return a new place; what an outsider sees of it is seen past the proxy."""
    bucket = server.new_bucket()
    if isinstance(server, GCSServer):
        place = Place.on_gcs(server, bucket).child("run")
    else:
        place = Place.on_server(server, bucket).child("run")
    options = {**place.options, "endpoint_url": proxy.endpoint, "timeout": timeout}
    if server.name == "ministack":
        options["checksum"] = "none"  # it takes seconds for that of a part, which would be the timeout
    return Faulty(proxy, replace(place, options=options))


@pytest.fixture
def faulty(moto: S3Server) -> Iterator[Faulty]:
    with proxied(moto.endpoint) as proxy:
        yield under(moto, proxy)


@pytest.fixture
def pool(rank_pool: RankPools) -> RankPool:
    return rank_pool(RANKS)


def some_state(number: int) -> states.State:
    """Return a tensor of two parts a rank, one that every rank has, and a plain value."""
    half_part = S3_PART_SIZE // 2 // torch.float32.itemsize
    mesh = states.world_mesh()
    return {
        "big": states.distributed(f"big {number}", (RANKS * 3, half_part), torch.float32, mesh, Shard(0)),
        "small": states.content(f"small {number}", (3, 3), torch.float32),
        "step": number,
    }


def save(_rank: int, place: Place, number: int) -> None:
    dcp.save(some_state(number), storage_writer=place.writer(overwrite=True))


def load(_rank: int, place: Place, number: int) -> None:
    expected = some_state(number)
    loaded = states.erase(some_state(number))
    dcp.load(loaded, storage_reader=place.reader())
    states.assert_bit_exact(loaded, expected)


def save_and_load_in(
    errors: TransientErrors, pool: RankPool, faulty: Faulty, times: int, places: int = 1
) -> None:
    """Save and load so many times, then assert that nothing but the last checkpoints is left.

    The saves go to ``places`` in turn: the first to each creates a checkpoint, the others overwrite one.
    """
    faulty.proxy.rule(errors)
    for number in range(times):
        place = faulty.place.child(f"step-{number % places}")
        pool(save, place, number, deadline=CALL_SECONDS)
        pool(load, place, number, deadline=CALL_SECONDS)
        faulty.proxy.forget()  # the bodies, not the rule
        faulty.proxy.rule(errors)
    assert faulty.place.pending() == set()
    for index in range(places):
        place = faulty.place.child(f"step-{index}")
        assert place.visible() == committed(place)


@pytest.fixture
def server_named(s3_server_named: Callable[[str], S3Server], gcs: GCSServer) -> ServerNamed:
    """Return a server of S3 or of GCS by name."""
    return lambda name: gcs if name == GCS else s3_server_named(name)


@pytest.mark.parametrize(("name", "times"), [("moto", 2), ("ministack", 1), (GCS, 2)])
def test_saves_and_loads_succeed_while_a_fifth_of_all_requests_fails(
    pool: RankPool, server_named: ServerNamed, name: str, times: int
) -> None:
    server, errors = server_named(name), TransientErrors(seed=3, share=SHARE)
    with proxied(server.endpoint) as proxy:
        save_and_load_in(errors, pool, under(server, proxy), times)
    assert errors.injected


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["moto", GCS])
def test_fifty_saves_and_loads_succeed_while_a_fifth_of_all_requests_fails(
    pool: RankPool, server_named: ServerNamed, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    server, errors = server_named(name), TransientErrors(seed=1, share=SHARE)
    with proxied(server.endpoint) as proxy:
        save_and_load_in(errors, pool, under(server, proxy, SOAK_SECONDS), times=50, places=2)
    with capsys.disabled():
        print(f"\n50 saves and 50 loads on {RANKS} ranks, {name}:\n{errors.table()}")  # noqa: T201 - asked for
    assert {kind for kind, _ in errors.injected} == set(KINDS)


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("moto", "PutObject"),
        ("moto", "CompleteMultipartUpload"),
        ("moto", "CreateMultipartUpload"),
        (GCS, "UploadPart"),
        (GCS, "CompleteMultipartUpload"),
        (GCS, "CreateMultipartUpload"),
    ],
)
def test_an_answer_lost_to_each_step_of_the_commit_is_no_error(
    pool: RankPool, server_named: ServerNamed, name: str, operation: str
) -> None:
    def spoilt(request: Request) -> Spoiling:
        wanted = operation != "PutObject" or request.target.endswith("/.metadata")
        if request.operation == operation and wanted:
            with lock:
                lost[request.target] += 1
                return LoseAnswer() if lost[request.target] == 1 else None
        return None

    lock, lost = threading.Lock(), Counter[str]()
    server = server_named(name)
    with proxied(server.endpoint) as proxy:
        faulty = under(server, proxy)
        proxy.rule(spoilt)
        pool(save, faulty.place, 1)
        assert lost
        assert all(count > 1 for count in lost.values())
        assert faulty.place.pending() == set()
        assert faulty.place.visible() == committed(faulty.place)
        pool(load, faulty.place, 1)


def save_many_parts(_rank: int, place: Place) -> None:
    wide = states.content("wide", (MANY_PARTS, S3_PART_SIZE // torch.float32.itemsize), torch.float32)
    dcp.save({f"wide {dist.get_rank()}": wide}, storage_writer=place.writer())


def test_a_rank_slows_down_when_the_store_says_so(pool: RankPool, faulty: Faulty) -> None:
    busy = Busy(faulty.proxy, most=2, seconds=0.05)
    faulty.proxy.rule(busy)
    pool(save_many_parts, faulty.place, deadline=CALL_SECONDS)
    after = busy.seen[next(index for index, count in enumerate(busy.seen) if count > 2) :]
    assert fmean(after[len(after) // 2 :]) < fmean(after[:8]), busy.seen
    # Threads that wait each by itself are refused twice for every part.
    assert sum(count > 2 for count in after) < RANKS * MANY_PARTS, busy.seen


_KEYS = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
for number in range(1, 1000):
    try:
        os.close(os.open(folder / str(number), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        continue
    break
print(json.dumps({"Version": 1, "AccessKeyId": f"KEY{number}", "SecretAccessKey": "secret"}))
"""
_KEY = re.compile(r"Credential=KEY(\d+)/")
_UPLOAD = re.compile(r"[?&]uploadId=([^&]+)")


class Keys:
    """Keys that a real ``credential_process`` hands out, each with a number in it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder = folder / "keys"
        self._folder.mkdir()
        script, config = folder / "keys.py", folder / "config"
        script.write_text(_KEYS)
        command = f"{sys.executable} -S -I {script} {self._folder}"
        config.write_text(f"[default]\ncredential_process = {command}\n")
        patch.setenv("AWS_CONFIG_FILE", str(config))

    @property
    def count(self) -> int:
        """How many were handed out so far: the number of the last."""
        return len(list(self._folder.iterdir()))

    def number(self, request: Request) -> int:
        """Return that of the key that a request is signed with."""
        match = _KEY.search(request.headers["authorization"])
        assert match
        return int(match[1])

    def place(self, place: Place) -> Place:
        """Return the place without credentials, so that they are looked for."""
        options = {name: value for name, value in place.options.items() if name != "storage_options"}
        return replace(place, options={**options, "concurrency": 2})


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    return Keys(tmp_path, monkeypatch)


@pytest.mark.parametrize("code", ["ExpiredToken", "TokenRefreshRequired", "InvalidToken", "RequestExpired"])
def test_credentials_that_expire_during_an_upload_are_renewed_and_the_upload_goes_on(
    faulty: Faulty, keys: Keys, code: str
) -> None:
    expired = 0

    def strict(request: Request) -> Spoiling:
        """Refuse every key that was handed out before the third part was sent."""
        nonlocal expired
        if expired == 0 and len(faulty.proxy.seen("UploadPart")) >= 2:
            expired = keys.count
        return Answer(400, code) if keys.number(request) <= expired else None

    faulty.proxy.rule(strict)
    place = keys.place(faulty.place)
    state = {"wide": states.content("wide", (4, S3_PART_SIZE // torch.float32.itemsize), torch.float32)}
    dcp.save(state, storage_writer=place.writer())

    assert 0 < expired < keys.count
    parts = faulty.proxy.seen("UploadPart")
    uploads = {match[1] for part in parts if (match := _UPLOAD.search(part.target))}
    assert (len(uploads), len(faulty.proxy.seen("CreateMultipartUpload"))) == (1, 1)
    assert {keys.number(part) > expired for part in parts} == {False, True}
    assert place.pending() == set()
    loaded = states.erase({name: value.clone() for name, value in state.items()})
    dcp.load(loaded, storage_reader=place.reader())
    states.assert_bit_exact(loaded, state)


def test_credentials_that_expire_before_a_request_whose_answer_has_no_body_are_renewed(
    faulty: Faulty, keys: Keys
) -> None:
    """The answer to a HEAD can't say what is wrong."""
    place = keys.place(faulty.place)
    store = open_store(Target.parse(place.uri, **place.options))
    store.put("name", b"data", Overwrite())
    expired = keys.count
    faulty.proxy.rule(lambda request: Answer(400) if keys.number(request) <= expired else None)
    assert store.stat("name").size == 4
    assert len(faulty.proxy.seen("HeadObject")) == 2


def test_credentials_that_stay_expired_are_renewed_twice_and_then_denied(faulty: Faulty, keys: Keys) -> None:
    faulty.proxy.rule(lambda _: Answer(400, "ExpiredToken"))
    place = keys.place(faulty.place)
    with pytest.raises(AccessDeniedError, match="ExpiredToken"):
        open_store(Target.parse(place.uri, **place.options)).put("name", b"data", Overwrite())
    numbers = [keys.number(request) for request in faulty.proxy.seen("PutObject")]
    assert len(numbers) == len(set(numbers)) == 3
