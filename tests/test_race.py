"""Processes that save to one place at the same moment: one wins, the others are told and leave nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cloudckpt.backends.errors import CheckpointError, CheckpointExistsError
from cloudckpt.backends.format import metadata as md
from support.places import Place
from support.racers import Order, Racers, racers, state_of
from support.shortcomings import why_a_rival_is_not_noticed_at

FEW, MANY = 6, 16
"""Processes, each of which takes a second of a processor to start."""
SHORT, LONG = 3, 20
"""Rounds."""


@pytest.fixture(scope="module")
def jobs() -> Iterator[Racers]:
    with racers(FEW) as started:
        yield started


@pytest.fixture(scope="module")
def many_jobs() -> Iterator[Racers]:
    with racers(MANY) as started:
        yield started


@pytest.fixture
def _expect_rivals(request: pytest.FixtureRequest, place: Place) -> None:
    """Allow a race to be lost where the server of a user does not support conditions."""
    if reason := why_a_rival_is_not_noticed_at(place):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=False))


def loaded(place: Place) -> int:
    """Whose state is there: whole, and nothing beside it."""
    state = {"x": torch.zeros(1000, dtype=torch.int64), "y": torch.zeros(10), "step": -1}
    dcp.load(state, storage_reader=place.reader(), no_dist=True)
    number = state["step"]
    assert isinstance(number, int)
    expected = state_of(number)
    assert all(torch.equal(torch.as_tensor(state[name]), torch.as_tensor(expected[name])) for name in state)
    named = md.objects_of(md.load(place.read(md.METADATA_NAME), uri=place.uri))
    assert place.visible() == {md.METADATA_NAME, *named}
    assert place.pending() == set()
    return number


def winners(outcomes: Sequence[CheckpointError | None]) -> list[int]:
    """Who succeeded; all others must have been told that another did."""
    assert all(isinstance(error, CheckpointExistsError | None) for error in outcomes), outcomes
    return [number for number, error in enumerate(outcomes) if error is None]


def race_to_create(jobs: Racers, count: int, run: Place, rounds: int) -> None:
    for step in range(rounds):
        place = run.child(f"step-{step}")
        # In every other round nobody commits before all have found nothing there.
        order = Order(place, begin_with=count, commit_with=count if step % 2 else 1)
        assert winners(jobs.race([order] * count)) == [loaded(place)]


@pytest.mark.usefixtures("_expect_rivals")
def test_of_many_jobs_that_create_a_checkpoint_at_once_one_wins(jobs: Racers, place: Place) -> None:
    race_to_create(jobs, FEW, place, SHORT)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("_expect_rivals")
def test_of_many_jobs_that_create_a_checkpoint_at_once_one_wins_every_time(
    many_jobs: Racers, place: Place
) -> None:
    race_to_create(many_jobs, MANY, place, LONG)


@pytest.mark.usefixtures("_expect_rivals")
def test_of_two_jobs_that_overwrite_a_checkpoint_at_once_one_wins(jobs: Racers, place: Place) -> None:
    last = FEW - 1
    jobs.begin(last, Order(place))
    assert jobs.end(last) is None
    for _ in range(SHORT):
        order = Order(place, overwrite=True, begin_with=2, commit_with=2)
        assert winners(jobs.race([order] * 2)) == [loaded(place)]


def test_a_job_that_sleeps_through_a_commit_cannot_create_over_it(jobs: Racers, place: Place) -> None:
    jobs.begin(0, Order(place, stops=True))
    jobs.await_stop(0)
    jobs.begin(1, Order(place))
    assert jobs.end(1) is None
    jobs.go_on(0)
    assert isinstance(jobs.end(0), CheckpointExistsError)
    assert loaded(place) == 1


def test_a_job_that_sleeps_through_a_commit_cannot_overwrite_it(jobs: Racers, place: Place) -> None:
    jobs.begin(2, Order(place))
    assert jobs.end(2) is None
    jobs.begin(0, Order(place, overwrite=True, stops=True))
    jobs.await_stop(0)
    jobs.begin(1, Order(place, overwrite=True))
    assert jobs.end(1) is None
    jobs.go_on(0)
    assert isinstance(jobs.end(0), CheckpointExistsError)
    assert loaded(place) == 1
