"""What a server is probed for is what its faults are known to be."""

from __future__ import annotations

import pytest

from support.live import LiveStore
from support.places import LIVE, Place
from support.servers import S3Server
from support.shortcomings import (
    FAULTS,
    RACES,
    faults_of,
    races_of,
    why_a_rival_is_not_noticed_at,
    why_stock_cannot_write_to,
)


@pytest.fixture
def place(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A server as if a user had named it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    options = (("endpoint_url", s3_server.endpoint), ("region", "us-east-1"))
    return Place(LIVE, f"s3://{s3_server.new_bucket()}/mine", LiveStore("s3", options))


def test_probes_find_the_known_faults(place: Place, s3_server: S3Server) -> None:
    assert set(faults_of(place)) == set(FAULTS[s3_server.name])
    assert set(races_of(place)) == set(RACES.get(s3_server.name, {}))


def test_probes_find_where_stock_dcp_cannot_write(place: Place, s3_server: S3Server) -> None:
    assert bool(why_stock_cannot_write_to(place)) == (s3_server.name == "juicefs")


def test_probes_find_where_rivals_are_not_noticed(place: Place, s3_server: S3Server) -> None:
    assert bool(why_a_rival_is_not_noticed_at(place)) == (s3_server.name in {"rclone", "juicefs"})


def test_probes_leave_nothing(place: Place) -> None:
    faults_of(place)
    races_of(place)
    why_stock_cannot_write_to(place)
    why_a_rival_is_not_noticed_at(place)
    assert place.visible() == place.pending() == set()
