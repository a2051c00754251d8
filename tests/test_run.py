"""A run's steps: which stay, and how many requests it takes to find them among thousands."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.endpoint import Endpoint, served
from bench.growth import reached
from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.store import Overwrite
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.target import Target
from cloudckpt.retention import Retention
from cloudckpt.run import Run
from support.gcs import GCSServer, gcs_server

STEPS = 2000


@given(
    steps=st.sets(st.integers(0, 300), max_size=60),
    keep_last=st.integers(1, 10) | st.none(),
    keep_every=st.integers(1, 50) | st.none(),
    keep_best=st.integers(1, 5) | st.none(),
    metrics=st.dictionaries(st.integers(0, 300), st.floats(allow_nan=True), max_size=60),
)
def test_what_goes_is_old_and_not_kept_for_good(
    steps: set[int],
    keep_last: int | None,
    keep_every: int | None,
    keep_best: int | None,
    metrics: dict[int, float],
) -> None:
    if keep_last is None:
        assert Retention().superseded(sorted(steps)) == []
        return
    gone = Retention(keep_last, keep_every, keep_best).superseded(list(steps), metrics.get)
    left = steps - set(gone)
    assert gone == sorted(gone)
    assert set(sorted(steps)[-keep_last:]) <= left
    if keep_every is not None:
        assert {step for step in steps if step % keep_every == 0} <= left
    known = sorted((metrics[step], step) for step in steps & metrics.keys() if metrics[step] == metrics[step])
    best = {step for _, step in known[-keep_best:]} if keep_best is not None else set[int]()
    assert best <= left
    for step in left - best - set(sorted(steps)[-keep_last:]):
        assert keep_every is not None
        assert step % keep_every == 0


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
