"""How many requests a rank may have in flight, by the options and by what the host has."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from typing import Any

import pytest

from cloudckpt.backends.config.options import Options
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.http.rates import Rates
from cloudckpt.backends.transfer import request_limit
from cloudckpt.backends.transfer.request_limit import at_first, connections, transfers


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rates]:
    """A host without limits, where nothing has been measured."""
    held = Rates()
    request_limit._share.cache_clear()
    monkeypatch.setattr(request_limit, "rates", lambda: held)
    monkeypatch.setattr(request_limit, "pids_room", lambda: None)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    yield held
    request_limit._share.cache_clear()


@pytest.mark.parametrize(("ranks", "most"), [("1", 64), ("4", 64), ("8", 32), ("64", 8), ("", 64), ("x", 64)])
def test_the_ranks_of_a_host_share_its_connections(
    held: Rates, monkeypatch: pytest.MonkeyPatch, ranks: str, most: int
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert connections(Options.model_validate({})) == most


@pytest.mark.parametrize(("soft", "most"), [(1 << 20, 64), (256, 32), (16, 8)])
def test_descriptors_limit_connections(
    held: Rates, monkeypatch: pytest.MonkeyPatch, soft: int, most: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert connections(Options.model_validate({})) == most


@pytest.mark.parametrize(("room", "most"), [(10_000, 64), (100, 25), (3, 8)])
def test_threads_that_a_container_allows_limit_connections(
    held: Rates, monkeypatch: pytest.MonkeyPatch, room: int, most: int
) -> None:
    monkeypatch.setattr(request_limit, "pids_room", lambda: (room, "pids.max"))
    assert connections(Options.model_validate({})) == most


def test_the_option_is_what_is_used(held: Rates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert connections(Options.model_validate({"concurrency": 100})) == 100


@pytest.mark.parametrize(
    ("seconds", "count"),
    [([], 32), ([0.0008, 0.2, 0.2], 4), ([0.005], 8), ([0.03, 0.2], 30), ([0.1, 0.2], 64)],
)
def test_the_number_of_connections_at_first_grows_with_the_distance(
    held: Rates, seconds: list[float], count: int
) -> None:
    for one in seconds:
        held.answered(one)
    assert at_first(64) == count
    assert at_first(2) == 2


def test_the_ranks_of_a_host_share_the_connections_at_first(
    held: Rates, monkeypatch: pytest.MonkeyPatch
) -> None:
    held.answered(0.1)
    for ranks, count in [(1, 64), (4, 16), (64, 8)]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert at_first(64) == count


@pytest.mark.parametrize(
    ("uri", "options", "count"),
    [
        ("memory://a", {}, 8),
        ("file:///a", {"concurrency": 3}, 3),
        ("s3://bucket/a", {"anon": True, "region": "eu-central-1"}, 64),
        ("s3://bucket/a", {"anon": True, "region": "eu-central-1", "concurrency": 5}, 5),
    ],
)
def test_stores_that_are_not_distant_have_the_usual_number(
    held: Rates, uri: str, options: dict[str, Any], count: int
) -> None:
    target = Target.parse(uri, **options)
    with open_store(target) as store:
        assert transfers(store, target.options) == count
