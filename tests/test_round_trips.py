"""Round trips of a small save and load on a warm process, counted where requests pass: S3 and GCS.

They are counted until the call returns. The lease of a load is deleted after that.
"""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CommitError
from cloudckpt.backends.load.read_lease import put_lease
from cloudckpt.backends.load.reader import StorageReader
from cloudckpt.backends.manage.delete import delete_checkpoint
from cloudckpt.backends.save import commit_requests
from cloudckpt.backends.save.commit_requests import Coordinator
from cloudckpt.backends.save.save_lease import SaveLease, marker_name
from support import living, round_trips
from support.places import Place, new_place
from support.proxy import Proxy, proxied
from support.ranks import RankPool
from support.scenario import RemoteStore
from support.servers import S3Server

SAVE = 5
COMMIT = 4
LOAD = 2


@pytest.fixture(params=["moto", "gcs"])
def far(
    request: pytest.FixtureRequest, tmp_path: Any, s3_server_named: Callable[[str], S3Server]
) -> Iterator[tuple[Place, Proxy]]:
    """A place behind a proxy that answers a round trip late once a test says so."""
    place = new_place(request.param, tmp_path, s3_server_named)
    assert place.server is not None and place.server.endpoint is not None
    with proxied(place.server.endpoint) as proxy:
        yield place.behind(proxy.endpoint), proxy


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def ranks(request: pytest.FixtureRequest, rank_pool: Callable[[int], RankPool]) -> Iterator[RankPool]:
    pool = rank_pool(request.param)
    yield pool
    pool(living.end)


def state(rank: int, value: float) -> dict[str, Any]:
    return {f"of rank {rank}": torch.full((1000,), value), "common": torch.full((500,), value)}


def counted(proxy: Proxy, act: Callable[[], object], most: int, commit: int | None = None) -> None:
    """Do something far away, and assert how many round trips it takes, and the commit comes at the latest.

    A machine that is busy starts a request late, which then seems to wait for another one's answer. It is
    done again with answers that take longer, beside which that is short.
    """
    said = ""
    for seconds in round_trips.SECONDS:
        round_trips.slow(proxy, seconds)
        try:
            act()
        finally:
            proxy.rule(None)
        exchanges = proxy.exchanges
        chain = round_trips.chain_of(exchanges)
        to_commit = round_trips.chain_to(exchanges, round_trips.is_commit) if commit else round_trips.Chain()
        if 0 < len(chain) <= most and len(to_commit) <= (commit or 0):
            return
        said = (
            f"{len(chain)} round trips, of which {most} are allowed:\n{chain}\n"
            f"{len(to_commit)} of {commit} to the commit:\n{to_commit}\nof\n{round_trips.all_of(exchanges)}"
        )
    pytest.fail(said, pytrace=False)


def test_a_save_and_a_load_by_dcp(far: tuple[Place, Proxy], ranks: RankPool) -> None:
    run, proxy = far

    def save(rank: int, place: Place) -> None:
        dcp.save(state(rank, 1.0), storage_writer=place.writer())

    def load(rank: int, place: Place) -> None:
        into = state(rank, 0.0)
        dcp.load(into, storage_reader=place.reader())
        assert torch.equal(into["common"], state(rank, 1.0)["common"])

    ranks(save, run.child("warm"))
    names = itertools.count()
    counted(proxy, lambda: ranks(save, run.child(f"counted-{next(names)}")), SAVE, COMMIT)
    ranks(load, run.child("warm"))
    counted(proxy, lambda: ranks(load, run.child("counted-0")), LOAD)


def test_a_checkpointer(far: tuple[Place, Proxy], ranks: RankPool) -> None:
    run, proxy = far
    steps = itertools.count(1)

    def save(rank: int, step: int) -> None:
        living.living(run.uri, **run.options).save(step, state(rank, step))

    def async_save(rank: int, step: int) -> None:
        living.living(run.uri, **run.options).async_save(step, state(rank, step)).result()

    def load(rank: int, step: int | None, expected: int) -> None:
        into = state(rank, 0.0)
        assert living.living(run.uri, **run.options).load(into, step) == expected
        assert torch.equal(into["common"], state(rank, float(expected))["common"])

    def load_as_another_job(rank: int, expected: int, number: int) -> None:
        job = living.living(run.uri, **run.options, save_timeout=600.0 + number)
        assert job.load(state(rank, 0.0)) == expected

    ranks(save, next(steps))
    counted(proxy, lambda: ranks(save, next(steps)), SAVE, COMMIT)
    counted(proxy, lambda: ranks(async_save, next(steps)), SAVE, COMMIT)
    newest = next(steps)
    ranks(save, newest)
    ranks(load, 1, 1)
    counted(proxy, lambda: ranks(load, 2, 2), LOAD)
    counted(proxy, lambda: ranks(load, None, newest), LOAD)
    counted(proxy, lambda: ranks(load_as_another_job, newest, next(steps)), LOAD + 1)


def test_an_existing_checkpoint_is_refused_on_every_rank_before_a_part_is_sent(
    far: tuple[Place, Proxy], ranks: RankPool
) -> None:
    run, proxy = far
    place = run.child("there")

    def save(rank: int) -> None:
        dcp.save(state(rank, 1.0), storage_writer=place.writer())

    ranks(save)
    before = place.visible()
    round_trips.slow(proxy, round_trips.SECONDS[0])
    for outcome in ranks.outcomes(save):
        assert isinstance(outcome.error, CheckpointException)
        assert isinstance(outcome.error.failures[0][0], cloudckpt.CheckpointExistsError)
    assert proxy.seen("UploadPart") == []
    proxy.rule(None)
    assert place.visible() == before
    assert place.is_gcs or place.pending() == set()


def test_a_step_that_is_deleted_between_its_metadata_and_the_lease_is_not_there(
    far: tuple[Place, Proxy],
) -> None:
    run, _ = far
    fetch, fetched = StorageReader.fetch_metadata, threading.Event()

    def fetching(reader: StorageReader) -> bytes:
        try:
            return fetch(reader)
        finally:
            fetched.set()

    def put_late(target: Target, rank: int) -> SaveLease | None:
        assert fetched.wait(60)
        delete_checkpoint(target)
        return put_lease(target, rank)

    with cloudckpt.Checkpointer(run.uri, preemption_grace=None, **run.options) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(0, float(step)))
        with (
            mock.patch.object(StorageReader, "fetch_metadata", fetching),
            mock.patch("cloudckpt.read_ahead.put_lease", put_late),
            pytest.raises(cloudckpt.CheckpointNotFoundError, match="step 2 was deleted while it was loaded"),
        ):
            checkpointer.load(state(0, 0.0), step=2)
        assert checkpointer.load(state(0, 0.0)) == 1
    assert not [name for name in run.visible() if ".cloudckpt" in name]


@pytest.mark.parametrize("fresh", [True, False])
def test_a_look_at_the_marker_that_is_old_at_the_commit_is_repeated(
    monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    store = RemoteStore(Target.parse(f"memory://{uuid.uuid4().hex}"))
    monkeypatch.setattr(commit_requests, "_FRESH", 60.0 if fresh else -1.0)
    requests = Coordinator(store)
    requests.mark("0" * 32, 0)
    requests.settle()
    requests.begin_check()
    if fresh:
        requests.check()
    else:
        store.delete([marker_name("0" * 32)])
        with pytest.raises(CommitError, match="its marker is gone"):
            requests.check()
    requests.end()
    assert store.list().objects == ()
