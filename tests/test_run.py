"""A run's steps: which stay, and how many requests it takes to find them among thousands."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.endpoint import Endpoint, served
from bench.growth import reached
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Overwrite
from cloudckpt.retention import Retention
from cloudckpt.run import Entry, Run
from support.gcs import GCSServer, gcs_server

STEPS = 2000
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def entry(step: int, at: datetime | None = BEGAN, *, pinned: bool = False) -> Entry:
    return Entry(f"step-{step}", step, "committed", 1, 1, at, pinned)


@given(
    steps=st.sets(st.integers(0, 300), max_size=60),
    keep_last=st.integers(1, 10) | st.none(),
    keep_every=st.integers(1, 50) | st.none(),
    keep_best=st.integers(1, 5) | st.none(),
    metrics=st.dictionaries(st.integers(0, 300), st.floats(allow_nan=True), max_size=60),
    pinned=st.sets(st.integers(0, 300), max_size=5),
)
def test_what_goes_is_old_and_not_kept_for_good(
    *,
    steps: set[int],
    keep_last: int | None,
    keep_every: int | None,
    keep_best: int | None,
    metrics: dict[int, float],
    pinned: set[int],
) -> None:
    committed = {step: entry(step, pinned=step in pinned) for step in steps}
    if keep_last is None:
        assert Retention().superseded(committed) == []
        return
    gone = Retention(keep_last, keep_every, keep_best).superseded(committed, metrics.get)
    assert gone == sorted(gone)
    assert not pinned & set(gone)
    steps -= pinned
    left = steps - set(gone)
    assert set(sorted(steps)[-keep_last:]) <= left
    if keep_every is not None:
        assert {step for step in steps if step % keep_every == 0} <= left
    known = sorted((metrics[step], step) for step in steps & metrics.keys() if metrics[step] == metrics[step])
    best = {step for _, step in known[-keep_best:]} if keep_best is not None else set[int]()
    assert best <= left
    for step in left - best - set(sorted(steps)[-keep_last:]):
        assert keep_every is not None
        assert step % keep_every == 0


@given(
    gaps=st.lists(st.integers(0, 200), min_size=1, max_size=40),
    keep_last=st.integers(1, 5),
    hours=st.integers(1, 5),
)
def test_of_each_stretch_of_time_one_step_stays(gaps: list[int], keep_last: int, hours: int) -> None:
    """Pruned after each commit, as a run is: what stays does not depend on what went in between."""
    retention = Retention(keep_last, timedelta(hours=hours))
    run: dict[int, Entry] = {}
    minutes = 0
    for step, gap in enumerate(gaps):
        minutes += gap
        run[step] = entry(step, BEGAN + timedelta(minutes=minutes))
        for gone in retention.superseded(run):
            del run[gone]
    kept = [_minutes(run[step]) for step in sorted(run)][:-keep_last]
    assert all(later - earlier >= 60 * hours for earlier, later in itertools.pairwise(kept))
    every = list(itertools.accumulate(gaps))
    for at in every[:-keep_last]:  # nothing is farther from a step that stayed than that
        assert any(at - 60 * hours < minute <= at for minute in map(_minutes, run.values()))


def _minutes(one: Entry) -> float:
    assert one.modified is not None
    return (one.modified - BEGAN).total_seconds() / 60


def test_a_step_whose_time_is_not_told_stays() -> None:
    committed = {1: entry(1), 2: entry(2, None), 3: entry(3), 4: entry(4)}
    assert Retention(1, timedelta(hours=1)).superseded(committed) == [3]


def test_folders_sort_as_the_steps_do() -> None:
    run = Run(Target.parse("memory://sorted"))
    steps = [0, 9, 10, 99, 12_345, 10**9, 10**10 - 1]
    names = [run.folder(step) for step in steps]
    assert names == sorted(names)
    assert run.at(7).uri == "memory://sorted/step-0000000007"
    with pytest.raises(ConfigurationError, match="whole number"):
        run.folder(10**10)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with served() as running:
        yield running


def fill(run: Run, begun: int) -> None:
    """Two objects for each step, the last ``begun`` of them without metadata."""
    with open_store(run.target) as store, ThreadPoolExecutor(8) as pool:

        def put(step: int) -> None:
            store.put(f"{run.folder(step)}/__0_0.{'0' * 32}.distcp", b"data", Overwrite())
            if step < STEPS - begun:
                store.put(f"{run.folder(step)}/.metadata", b"metadata", Overwrite())

        list(pool.map(put, range(STEPS)))


def test_the_newest_of_two_thousand_steps_takes_five_requests_on_s3(endpoint: Endpoint) -> None:
    server = endpoint.server
    run = Run(Target.parse(f"s3://{server.new_bucket()}/run", **reached(server)))
    fill(run, begun=1)
    endpoint.reset()
    assert run.newest() == STEPS - 2
    assert sum(endpoint.counts().requests.values()) <= 5
    endpoint.reset()
    assert run.steps() == list(range(STEPS - 1))
    assert sum(endpoint.counts().requests.values()) <= 2 * STEPS // 1000 + 1


def test_the_newest_of_two_thousand_steps_takes_five_requests_on_gcs() -> None:
    with gcs_server() as server:
        run = Run(Target.parse(f"gs://{server.new_bucket()}/run", endpoint_url=server.endpoint))
        fill(run, begun=1)
        assert counted(server, run) == (STEPS - 2, list(range(STEPS - 1)))


def counted(server: GCSServer, run: Run) -> tuple[int | None, list[int]]:
    """The newest step and all of them, having counted the requests for both."""
    server.reset()
    newest = run.newest()
    assert len(server.requests()) <= 5 + 1  # the one that asks for the count
    server.reset()
    steps = run.steps()
    assert len(server.requests()) <= 2 * STEPS // 1000 + 1 + 1
    return newest, steps
