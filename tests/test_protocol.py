"""The commit protocol in every interleaving of the jobs that meet at a checkpoint, with faults anywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import PreconditionFailedError, UnansweredError, UncertainCommitError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.manage import confirmation
from cloudckpt.backends.save import commit
from cloudckpt.backends.save.commit import Previous
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.stores.memory import MemoryStore
from cloudckpt.run import Run
from support import roles
from support.interleave import Explored, Violation, explore
from support.roles import (
    clearer,
    collector,
    creator,
    deleter,
    lagging_collector,
    misled_pruner,
    overwriter,
    pruner,
    reader,
    withdrawer,
)
from support.scenario import (
    FIRST,
    IgnorantStore,
    LaggingStore,
    Limit,
    LyingStore,
    Part,
    RemoteStore,
    Role,
    Scenario,
)
from support.turnstile import METADATA, Kind, Step, Turnstile
from support.verdicts import judge
from support.world import World, in_flight_together, many_worlds, open_here

URI = "memory://protocol/step-0000000001"

CREATORS = (creator("A"), creator("B"))
OVERWRITERS = (overwriter("A"), overwriter("B"))
DELETER = deleter("D")
READER = reader("R")
COLLECTOR = collector("G")
CLEARER = clearer("G")

EMPTY = {
    "two jobs create": CREATORS,
    "two jobs create and one deletes": (*CREATORS, DELETER),
    "two jobs create and one reads": (*CREATORS, READER),
    "one job creates and garbage is collected": (CREATORS[0], COLLECTOR),
}
"""Who meets where nothing is."""
COMMITTED = {
    "two jobs overwrite": OVERWRITERS,
    "one job overwrites and one deletes": (OVERWRITERS[0], DELETER),
    "one job overwrites and one reads": (OVERWRITERS[0], READER),
    "one job overwrites and garbage is collected": (OVERWRITERS[0], COLLECTOR),
    "one job overwrites, one deletes and one reads": (OVERWRITERS[0], DELETER, READER),
    "two jobs overwrite and one deletes": (*OVERWRITERS, DELETER),
    "two jobs overwrite and one reads": (*OVERWRITERS, READER),
}
"""Who meets at a checkpoint."""
EVERYONE = {**EMPTY, **COMMITTED}
_LONGEST = "one job overwrites and garbage is collected"
"""Half a minute of a processor where one of them fails."""
OF_TWO = [meeting for meeting, met in EVERYONE.items() if len(met) == 2]
LIMITS = frozenset({Limit.OVERTAKEN})


@pytest.fixture(autouse=True)
def _worlds() -> Iterator[None]:
    with many_worlds():
        yield


def scenario(meeting: str, faults: int, **keywords: Any) -> Scenario:
    first = first_checkpoint() if meeting in COMMITTED else {}
    return Scenario(EVERYONE[meeting], URI, faults, first, **keywords)


def first_checkpoint() -> dict[str, bytes]:
    """Save what is there from the start once, and take it out of the store again."""
    store = MemoryStore(Target.parse(URI))
    roles.save(URI, name=FIRST)
    objects = {info.name: store.get(info.name)[0] for info in store.list().objects}
    store.delete(objects)
    return objects


Record = Callable[[str, object], None]


def search(case: Scenario, capsys: pytest.CaptureFixture[str], record_property: Record) -> Explored[Step]:
    """Explore, and say how much there was."""
    explored = explore(functools.partial(World, case, judge))
    size = f"{explored.schedules} schedules, {explored.states} states, {explored.ends} ends"
    record_property("explored", size)
    with capsys.disabled():
        print(f"[{size}] ", end="", flush=True)  # noqa: T201 - the search must not shrink unseen
    return explored


@pytest.mark.parametrize("meeting", EVERYONE)
def test_whoever_meets_the_promises_hold(
    meeting: str, capsys: pytest.CaptureFixture[str], record_property: Record
) -> None:
    explored = search(scenario(meeting, faults=0), capsys, record_property)
    assert explored.states > 20 * len(EVERYONE[meeting]) - 20 and explored.ends >= len(EVERYONE[meeting])


@pytest.mark.parametrize(
    "meeting",
    [pytest.param(one, marks=pytest.mark.soak) if one == _LONGEST else one for one in OF_TWO],
)
def test_whoever_of_two_dies_or_fails_anywhere_the_promises_hold(
    meeting: str, capsys: pytest.CaptureFixture[str], record_property: Record
) -> None:
    explored = search(scenario(meeting, faults=1, limits=LIMITS), capsys, record_property)
    assert explored.states > 200 and explored.ends > 30


@pytest.mark.parametrize(
    "meeting", ["two jobs create and one deletes", "one job overwrites, one deletes and one reads"]
)
def test_a_commit_that_arrives_late_among_three_breaks_no_promise(
    meeting: str, capsys: pytest.CaptureFixture[str], record_property: Record
) -> None:
    late = scenario(meeting, faults=1, limits=LIMITS, kinds=frozenset({Kind.LATE, Kind.SENT}))
    explored = search(late, capsys, record_property)
    assert explored.states > 500 and explored.ends > 50


@pytest.mark.parametrize(
    "meeting",
    [
        "two jobs create",
        pytest.param("two jobs overwrite", marks=pytest.mark.soak),
        "one job overwrites and one deletes",
    ],
)
def test_a_store_without_conditions_leaves_every_other_promise(
    meeting: str, capsys: pytest.CaptureFixture[str], record_property: Record
) -> None:
    case = scenario(meeting, faults=1, limits=LIMITS, store=IgnorantStore)
    explored = search(case, capsys, record_property)
    assert explored.states > 200 and explored.ends > 30


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("store", [MemoryStore, IgnorantStore])
@pytest.mark.parametrize("meeting", EVERYONE)
def test_whatever_fails_the_promises_hold(
    meeting: str, store: type[MemoryStore], capsys: pytest.CaptureFixture[str], record_property: Record
) -> None:
    faults = (
        2 if meeting in OF_TWO else 1
    )  # of three, two faults make more schedules than a night has time for
    explored = search(scenario(meeting, faults, limits=LIMITS, store=store), capsys, record_property)
    assert explored.states > 1000 and explored.ends > 100


in_every_order = pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
UNMARKED = frozenset({Limit.UNMARKED})


@in_every_order
@pytest.mark.parametrize(
    "meeting", [pytest.param(one, marks=() if one in OF_TWO else pytest.mark.soak) for one in EVERYONE]
)
def test_requests_that_are_in_flight_together_keep_the_promises(
    meeting: str, late: bool, capsys: pytest.CaptureFixture[str], record_property: Record
) -> None:
    with in_flight_together(late=late):
        case = scenario(meeting, faults=0, store=RemoteStore, limits=UNMARKED)
        search(case, capsys, record_property)


@in_every_order
@pytest.mark.parametrize(
    "meeting",
    [pytest.param(one, marks=() if one == "two jobs create" else pytest.mark.soak) for one in OF_TWO],
)
def test_whichever_request_of_those_in_flight_together_fails_the_promises_hold(
    meeting: str, late: bool, capsys: pytest.CaptureFixture[str], record_property: Record
) -> None:
    with in_flight_together(late=late):
        case = scenario(meeting, faults=1, store=RemoteStore, limits=LIMITS | UNMARKED)
        search(case, capsys, record_property)


@in_every_order
@pytest.mark.parametrize("writer", [CREATORS[0], OVERWRITERS[0]], ids=["creates", "overwrites"])
def test_a_save_with_requests_in_flight_together_that_is_taken_for_dead_commits_whole_or_not_at_all(
    writer: Role, late: bool, capsys: pytest.CaptureFixture[str], record_property: Record
) -> None:
    first = first_checkpoint() if writer in OVERWRITERS else {}
    limits = UNMARKED | {Limit.UNNOTICED}
    case = Scenario((writer, CLEARER), URI, 0, first, store=RemoteStore, limits=limits)
    with in_flight_together(late=late):
        search(case, capsys, record_property)


@pytest.mark.parametrize("writer", [CREATORS[0], OVERWRITERS[0]], ids=["creates", "overwrites"])
def test_a_save_that_is_taken_for_dead_commits_whole_or_not_at_all(
    writer: Role, capsys: pytest.CaptureFixture[str], record_property: Record
) -> None:
    first = first_checkpoint() if writer in OVERWRITERS else {}
    limits = frozenset({Limit.UNNOTICED})
    case = Scenario((writer, CLEARER), URI, 0, first, limits=limits)
    explored = search(case, capsys, record_property)
    assert explored.states > 50 and explored.ends > 5


LAGGING_COLLECTOR = lagging_collector("G")
PRUNER = pruner("P")
LAGGED: dict[str, tuple[Role, ...]] = {
    "one job creates and the run is pruned": (CREATORS[0], PRUNER),
    "one job overwrites and the run is pruned": (OVERWRITERS[0], PRUNER),
    "one job overwrites and the run is pruned by a step that is gone": (OVERWRITERS[0], misled_pruner("P")),
    "one job creates and garbage is collected": (CREATORS[0], LAGGING_COLLECTOR),
    "one job overwrites and garbage is collected": (OVERWRITERS[0], LAGGING_COLLECTOR),
    "one job overwrites and one deletes": (OVERWRITERS[0], DELETER),
    "a checkpoint is set aside and garbage is collected": (withdrawer("W"), LAGGING_COLLECTOR),
    "one job creates, garbage is collected and the run is pruned": (CREATORS[0], LAGGING_COLLECTOR, PRUNER),
}
"""Who meets where a listing shows what was there up to ten minutes ago."""
_LONG_LAGGED = {one for one, met in LAGGED.items() if len(met) > 2} | {
    "one job overwrites and the run is pruned",
    "one job creates and garbage is collected",
    "one job overwrites and garbage is collected",
}


def lagged(meeting: str, **keywords: Any) -> Scenario:
    met = LAGGED[meeting]
    first = {} if met[0] in CREATORS else first_checkpoint()
    return Scenario(met, URI, first=first, store=LaggingStore, lags=True, **keywords)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "meeting",
    [pytest.param(one, marks=pytest.mark.soak) if one in _LONG_LAGGED else one for one in LAGGED],
)
def test_listings_of_ten_minutes_ago_break_no_promise(
    meeting: str, capsys: pytest.CaptureFixture[str], record_property: Record
) -> None:
    # Of three, a pause makes more schedules than a night has time for.
    pauses = 1 if len(LAGGED[meeting]) == 2 else 0
    explored = search(lagged(meeting, faults=0, pauses=pauses), capsys, record_property)
    assert explored.states > 10 and explored.ends > 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("meeting", ["a checkpoint is set aside and garbage is collected"])
def test_listings_of_ten_minutes_ago_and_a_failure_break_no_promise(
    meeting: str, capsys: pytest.CaptureFixture[str], record_property: Record
) -> None:
    explored = search(lagged(meeting, faults=1, pauses=2, limits=LIMITS), capsys, record_property)
    assert explored.states > 100


# Where the promises end. Without the limits that the tests above put up with, the search finds each.


def fails(case: Scenario, message: str) -> None:
    with pytest.raises(Violation, match=message):
        explore(functools.partial(World, case, judge))


def test_a_save_taken_for_dead_right_at_its_commit_lacks_its_objects_until_it_looks_again() -> None:
    fails(Scenario((CREATORS[0], CLEARER), URI, 0), "A#1 is there, and its object .* is not")


def test_a_marker_that_comes_after_its_upload_lets_gc_without_an_age_abort_that() -> None:
    with in_flight_together(late=True):
        case = scenario("one job creates and garbage is collected", 0, store=RemoteStore)
        fails(case, "A met no fault and reported ObjectNotFoundError")


def test_a_commit_that_is_replaced_before_it_is_read_back_is_known_to_be_called_lost() -> None:
    case = scenario("two jobs overwrite", 1, kinds=frozenset({Kind.UNHEARD}))
    fails(case, "reported CheckpointExistsError, and its checkpoint was there")


def test_a_listing_that_is_taken_at_its_word_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each without one of the plain reads, or without the age below which nothing is deleted."""
    meetings = [*LAGGED]
    with monkeypatch.context() as patch:
        patch.setattr(LaggingStore, "lists_at_once", True)
        fails(lagged(meetings[0], faults=0, pauses=0), "A#1 is there, and its object .* is not")
        fails(lagged(meetings[3], faults=0, pauses=0), "A#1 is there, and its object .* is not")
    with monkeypatch.context() as patch:
        holds = Turnstile.holds
        patch.setattr(Turnstile, "holds", lambda one, name: name != METADATA and holds(one, name))
        fails(lagged(meetings[0], faults=0, pauses=1), "A#1 is there, and its object .* is not")
    with monkeypatch.context() as patch:
        patch.setattr(confirmation, "is_held", lambda *_: False)
        fails(lagged(meetings[6], faults=0, pauses=1), "what was set aside lacks")
    with monkeypatch.context() as patch:
        patch.setattr(confirmation, "leases_now", lambda _, listed, __: list(listed))
        fails(lagged(meetings[4], faults=0, pauses=1), "A met no fault and reported CommitError")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "among", lambda _, steps: {*steps})
        fails(lagged(meetings[2], faults=0, pauses=0), "P deleted the newest step")


# What follows breaks the protocol on purpose: a search that finds nothing there would prove nothing.

Patch = pytest.MonkeyPatch


def test_a_store_that_ignores_conditions_and_says_otherwise_is_found() -> None:
    fails(scenario("two jobs create", 0, store=LyingStore), "replaced A#1")
    fails(scenario("two jobs overwrite", 0, store=LyingStore), "replaced A#1")


def test_a_condition_on_what_is_there_at_the_last_moment_is_found(monkeypatch: Patch) -> None:
    put = commit.put_metadata

    def put_late(store: ObjectStore, name: str, data: bytes, save_id: str, _: Previous | None) -> None:
        put(store, name, data, save_id, commit.find_previous(store, name))

    monkeypatch.setattr(commit, "put_metadata", put_late)
    fails(scenario("two jobs overwrite", 0), "replaced A#1, and B had seen v0#1")


def test_an_overwrite_that_deletes_before_it_commits_is_found(monkeypatch: Patch) -> None:
    put = commit.put_metadata

    def clear(store: ObjectStore, name: str, data: bytes, save_id: str, previous: Previous | None) -> None:
        if previous is not None:
            store.delete(previous.objects)
        put(store, name, data, save_id, previous)

    monkeypatch.setattr(commit, "put_metadata", clear)
    fails(scenario("one job overwrites and one reads", 0), "v0#1 is there, and its object .* is not")


def test_a_commit_before_the_objects_are_complete_is_found(monkeypatch: Patch) -> None:
    monkeypatch.setattr(commit, "publish", lambda *_: {})
    fails(scenario("two jobs create", 0), "A#1 is there, and its object .* is not")


def settle_as(outcome: str, when: type[Exception], monkeypatch: Patch) -> None:
    """Take every failed put that raised ``when`` for settled in one way."""
    read_back = commit._read_back

    def settle(*place: Any, error: Exception, conditional: bool) -> Any:
        settled = read_back(*place, error=error, conditional=conditional)
        return commit._Outcome[outcome] if isinstance(error, when) else settled

    monkeypatch.setattr(commit, "_read_back", settle)


def test_a_broken_condition_that_is_taken_for_success_is_found(monkeypatch: Patch) -> None:
    settle_as("OURS", PreconditionFailedError, monkeypatch)
    fails(scenario("two jobs create", 0), "B reported success, and its checkpoint was never there")


def test_silence_that_is_taken_for_success_is_found(monkeypatch: Patch) -> None:
    settle_as("OURS", UnansweredError, monkeypatch)
    fails(scenario("two jobs create", 1), "A reported success, and its checkpoint was never there")


def test_silence_that_is_taken_for_failure_is_found(monkeypatch: Patch) -> None:
    settle_as("NOT_OURS", UnansweredError, monkeypatch)
    fails(scenario("two jobs create", 1), "A#1 is there, and its object .* is not")


def test_an_uncertain_save_that_takes_its_objects_away_is_found(monkeypatch: Patch) -> None:
    put = commit.put_metadata

    def give_up(store: ObjectStore, name: str, data: bytes, save_id: str, previous: Previous | None) -> None:
        try:
            put(store, name, data, save_id, previous)
        except UncertainCommitError:
            store.delete(md.objects_of(md.load(data, uri=store.uri)))
            raise

    monkeypatch.setattr(commit, "put_metadata", give_up)
    kinds = frozenset({Kind.SILENT})
    fails(scenario("two jobs create", 1, kinds=kinds), "A is uncertain and took its objects away")


def test_a_loser_that_leaves_its_objects_is_found(monkeypatch: Patch) -> None:
    monkeypatch.setattr(commit, "withdraw", lambda *_: None)
    fails(scenario("two jobs create", 0), "B reported CheckpointExistsError and left")


def deletes(act: Callable[[ObjectStore], tuple[str, ...]]) -> Role:
    def delete(uri: str) -> tuple[str, ...]:
        with open_here(Target.parse(uri)) as store:
            return act(store)

    return Role("D", Part.DELETES, delete)


def test_a_deletion_that_begins_with_the_objects_is_found() -> None:
    def objects_first(store: ObjectStore) -> tuple[str, ...]:
        previous = commit.find_previous(store, METADATA)
        names = (*sorted(previous.objects if previous else ()), METADATA)
        store.delete(names[:-1])
        store.delete(names[-1:])
        return names

    case = Scenario((deletes(objects_first), READER), URI, 0, first_checkpoint())
    fails(case, "v0#1 is there, and its object .* is not")


def test_a_deletion_that_takes_what_it_lists_is_found() -> None:
    def everything(store: ObjectStore) -> tuple[str, ...]:
        commit.find_previous(store, METADATA)
        names = tuple(info.name for info in store.list().objects)
        store.delete(names)
        return names

    case = Scenario((OVERWRITERS[0], deletes(everything)), URI, 0, first_checkpoint())
    fails(case, "D deleted .*, which it did not find named")


def test_a_load_that_looks_twice_is_found() -> None:
    def mix(uri: str) -> dict[str, Any]:
        return {**roles.load(uri), "y": roles.load(uri)["y"]}

    case = Scenario((OVERWRITERS[0], Role("R", Part.READS, mix)), URI, 0, first_checkpoint())
    fails(case, "R read .*, and the checkpoint was v0#1's")
