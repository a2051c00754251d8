"""A save that fails anywhere, on any rank, fails on every rank and leaves nothing behind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import Shard

import cloudckpt
from cloudckpt.backends.errors import (
    CheckpointError,
    CheckpointExistsError,
    CommitError,
    UncertainCommitError,
)
from support import states
from support.faults import Fault, FaultyPlanner, InjectedFault, Kind, PlannerFault, injected
from support.places import SOAKED, USUAL, Place, new_place
from support.ranks import RankPool, RankPools
from support.servers import S3Server
from support.shortcomings import why_a_rival_is_not_noticed_at

RANKS = 2
OPERATIONS = ("get", "stat", "list", "begin_upload", "upload_part")
"""Operations that any rank may call in a save, up to the commit."""

pytestmark = pytest.mark.parametrize(
    "place_name", [*USUAL, *(pytest.param(name, marks=pytest.mark.soak) for name in SOAKED)]
)


@dataclass(frozen=True, slots=True)
class Report:
    """What a rank saw of a save that was meant to fail."""

    error: CheckpointException | None
    failures: tuple[BaseException, ...]
    injected: bool
    visible: frozenset[str]
    pending: frozenset[str]


@pytest.fixture
def place(place_name: str, tmp_path: Path, s3_server_named: Callable[[str], S3Server]) -> Place:
    return new_place(place_name, tmp_path, s3_server_named)


@pytest.fixture
def pool(rank_pool: RankPools) -> RankPool:
    return rank_pool(RANKS)


def some_state(place: Place) -> states.State:
    """Return a tensor of three parts a rank, one that every rank has, and a plain value."""
    mesh = states.world_mesh()
    tenth_of_part = place.options["part_size"] // 10 // torch.float32.itemsize
    return {
        "big": states.distributed("big", (45, tenth_of_part), torch.float32, mesh, Shard(0)),
        "small": states.content("small", (3, 3), torch.float32),
        "step": 7,
    }


def blank(place: Place) -> states.State:
    erased: states.State = states.erase(some_state(place))
    return erased


def attempt(place: Place, save: Callable[[], Any], hit: Callable[[], bool]) -> Report:
    """Run a save and report how it ended and what an outsider then sees."""
    error: CheckpointException | None = None
    try:
        save()
    except CheckpointException as caught:
        error = caught
    dist.barrier()
    seen = frozenset(place.visible()), frozenset(place.pending())
    dist.barrier()
    failures = tuple(failure for failure, _ in error.failures.values()) if error is not None else ()
    return Report(error, failures, hit(), *seen)


def save_with_fault(rank: int, place: Place, fault: Fault, **options: Any) -> Report:
    writer = place.writer(**options)
    with injected(fault, rank) as journal:
        return attempt(
            place, lambda: dcp.save(some_state(place), storage_writer=writer), lambda: journal.injected
        )


@pytest.fixture(scope="module")
def calls_of(
    rank_pool: RankPools,
    tmp_path_factory: pytest.TempPathFactory,
    s3_server_named: Callable[[str], S3Server],
) -> Calls:
    """Return how often each rank calls each operation in a save that goes well, by the name of the place."""

    @functools.cache
    def calls(place_name: str) -> list[dict[str, int]]:
        return rank_pool(RANKS)(
            count_calls, new_place(place_name, tmp_path_factory.mktemp("counted"), s3_server_named)
        )

    return calls


def count_calls(rank: int, place: Place) -> dict[str, int]:
    with injected(None, rank) as journal:
        dcp.save(some_state(place), storage_writer=place.writer())
    return dict(journal.calls)


def fail_then_save_again(rank: int, place: Place, fault: Fault) -> Report:
    """Fail with one writer, save and load with the same writer, and report the failure."""
    writer = place.writer()
    with injected(fault, rank) as journal:
        report = attempt(
            place, lambda: dcp.save(some_state(place), storage_writer=writer), lambda: journal.injected
        )
    save_and_load(place, writer)
    return report


def save_and_load(place: Place, writer: cloudckpt.StorageWriter) -> None:
    expected = some_state(place)
    dcp.save(expected, storage_writer=writer)
    loaded = blank(place)
    dcp.load(loaded, storage_reader=place.reader())
    states.assert_bit_exact(loaded, expected)


def causes(error: BaseException) -> list[BaseException]:
    """Return an exception with the chain of what it was raised from."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__
    return chain


def assert_failed_cleanly(reports: list[Report], expected: type[BaseException] = CheckpointError) -> None:
    assert any(report.injected for report in reports)
    for report in reports:
        assert isinstance(report.error, CheckpointException)
        assert report.failures
        for failure in report.failures:
            assert isinstance(failure, expected), repr(failure)
            if isinstance(failure, CheckpointError):
                assert failure.uri is not None
                assert failure.rank is not None
        assert report.visible == frozenset()
        assert report.pending == frozenset()


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("method", ["create_local_plan", "create_global_plan"])
def test_a_fault_of_the_planner_leaves_nothing(pool: RankPool, place: Place, method: str, rank: int) -> None:
    failing_rank = 0 if method == "create_global_plan" else rank  # only the coordinator makes it

    def save(this: int) -> Report:
        planner = FaultyPlanner(method) if this == failing_rank else None
        writer = place.writer()
        report = attempt(
            place,
            lambda: dcp.save(some_state(place), storage_writer=writer, planner=planner),
            lambda: this == failing_rank,
        )
        save_and_load(place, writer)
        return report

    assert_failed_cleanly(pool(save), PlannerFault)


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("method", ["prepare_local_plan", "prepare_global_plan"])
def test_a_fault_after_the_writer_prepared_a_plan_leaves_nothing(
    pool: RankPool, place: Place, method: str, rank: int
) -> None:
    failing_rank = 0 if method == "prepare_global_plan" else rank

    def save(this: int) -> Report:
        class FailingWriter(cloudckpt.StorageWriter):
            def prepare_local_plan(self, plan: Any) -> Any:
                return self._fail_after("prepare_local_plan", super().prepare_local_plan(plan))

            def prepare_global_plan(self, plans: Any) -> Any:
                return self._fail_after("prepare_global_plan", super().prepare_global_plan(plans))

            def _fail_after(self, name: str, result: Any) -> Any:
                if (name, this) == (method, failing_rank):
                    raise PlannerFault(name)
                return result

        writer = FailingWriter(place.uri, **place.options)

        def save_or_abort() -> None:
            try:
                dcp.save(some_state(place), storage_writer=writer)
            finally:  # DCP calls no method of the storage writer after this failure
                writer.abort()

        report = attempt(place, save_or_abort, lambda: this == failing_rank)
        save_and_load(place, place.writer())
        return report

    assert_failed_cleanly(pool(save), PlannerFault)


Calls = Callable[[str], list[dict[str, int]]]

COMMIT = 2
"""Which put of the coordinator's makes ``.metadata`` visible; the first one is of the marker."""


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_fault_at_any_call_before_the_commit_leaves_nothing(
    pool: RankPool, place: Place, calls_of: Calls, operation: str, rank: int
) -> None:
    calls = calls_of(place.name)[rank].get(operation, 0)
    if operation == "upload_part":
        assert calls > 2
    if (operation, rank) == ("stat", 0):
        calls -= 1  # the last look at the marker comes after the commit
    for call in range(1, calls + 1):
        fault = Fault(operation, rank, call)
        run = fail_then_save_again if call == calls else save_with_fault
        assert_failed_cleanly(pool(run, place.child(f"call-{call}"), fault))


@pytest.mark.parametrize("kind", [Kind.FAILED_AFTER, Kind.SILENT_AFTER])
@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("operation", ["begin_upload", "upload_part"])
def test_a_request_that_was_carried_out_and_reported_as_failed_leaves_nothing(
    pool: RankPool, place: Place, operation: str, rank: int, kind: Kind
) -> None:
    assert_failed_cleanly(pool(save_with_fault, place, Fault(operation, rank, 1, kind)))


@pytest.mark.parametrize("kind", [Kind.REFUSED, Kind.FAILED_AFTER, Kind.SILENT_AFTER, Kind.WRONG_SIZE])
def test_a_fault_at_any_completion_leaves_nothing(
    pool: RankPool, place: Place, calls_of: Calls, kind: Kind
) -> None:
    calls = calls_of(place.name)[0]["complete_upload"]
    assert calls >= RANKS
    for call in range(1, calls + 1):
        run = fail_then_save_again if call == calls else save_with_fault
        fault = Fault("complete_upload", 0, call, kind)
        assert_failed_cleanly(pool(run, place.child(f"call-{call}"), fault), CommitError)


def scattered_state(place: Place) -> states.State:
    """Return tensors whose elements have to be gathered, so that every part holds memory until it is sent."""
    part = place.options["part_size"] // torch.float32.itemsize
    wide = states.content("scattered", (12, part // 2), torch.float32)
    return {f"scattered.{dist.get_rank()}.{index}": wide[2 * index :, ::2][:4] for index in range(5)}


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize(
    "options", [{"concurrency": 1}, {"concurrency": 4, "memory_limit": 6 << 20}], ids=["1 request", "6 MiB"]
)
def test_a_fault_with_few_requests_or_little_memory_leaves_nothing_and_does_not_hang(
    pool: RankPool, place: Place, rank: int, options: dict[str, Any]
) -> None:
    def save(this: int) -> Report:
        writer = place.writer(**options)
        with injected(Fault("upload_part", rank), this) as journal:
            return attempt(
                place,
                lambda: dcp.save(scattered_state(place), storage_writer=writer),
                lambda: journal.injected,
            )

    assert_failed_cleanly(pool(save))


@pytest.mark.parametrize("kind", [Kind.REFUSED, Kind.FAILED_AFTER, Kind.SILENT_BEFORE, Kind.SILENT_AFTER])
def test_a_put_of_the_marker_that_fails_leaves_nothing(pool: RankPool, place: Place, kind: Kind) -> None:
    assert_failed_cleanly(pool(fail_then_save_again, place, Fault("put", 0, 1, kind)))


@pytest.mark.parametrize("kind", [Kind.REFUSED, Kind.RIVAL])
def test_a_refused_put_of_the_metadata_leaves_nothing_of_ours(
    request: pytest.FixtureRequest, pool: RankPool, place: Place, kind: Kind
) -> None:
    if kind is Kind.RIVAL and (reason := why_a_rival_is_not_noticed_at(place)):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    reports = pool(save_with_fault, place, Fault("put", 0, COMMIT, kind))
    for report in reports:
        assert isinstance(report.error, CheckpointException)
        expected = CheckpointExistsError if kind is Kind.RIVAL else CommitError
        assert all(isinstance(failure, expected) for failure in report.failures)
        assert report.pending == frozenset()
        assert report.visible == (frozenset([".metadata"]) if kind is Kind.RIVAL else frozenset())
    if kind is Kind.RIVAL:
        assert place.read(".metadata") == b"not ours"


@pytest.mark.parametrize("kind", [Kind.FAILED_AFTER, Kind.SILENT_AFTER])
def test_a_commit_whose_answer_was_lost_is_found_by_reading_back(
    pool: RankPool, place: Place, kind: Kind
) -> None:
    """It is a success where no answer came; where the store reported a failure, it may yet not last."""
    for report in pool(save_with_fault, place, Fault("put", 0, COMMIT, kind)):
        if kind is Kind.SILENT_AFTER:
            assert report.error is None
        else:
            assert isinstance(report.error, CheckpointException)
            assert all(isinstance(failure, UncertainCommitError) for failure in report.failures)
        assert ".metadata" in report.visible
        assert report.pending == frozenset()

    def load(_rank: int) -> None:
        loaded = blank(place)
        dcp.load(loaded, storage_reader=place.reader())
        states.assert_bit_exact(loaded, some_state(place))

    pool(load)


def test_a_commit_that_nobody_answered_is_called_uncertain_and_the_next_save_settles_it(
    pool: RankPool, place: Place
) -> None:
    for report in pool(fail_then_save_again, place, Fault("put", 0, COMMIT, Kind.SILENT_BEFORE)):
        assert isinstance(report.error, CheckpointException)
        assert all(isinstance(failure, UncertainCommitError) for failure in report.failures)
        assert ".metadata" not in report.visible
        assert report.pending == frozenset()


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("clean_up", ["abort", "next save"])
def test_a_fault_of_finish_plan_is_cleaned_up_by_abort_or_by_the_next_save(
    pool: RankPool, place: Place, rank: int, clean_up: str
) -> None:
    """DCP calls no method of the storage writer after this failure, so what is open stays until then."""

    def save(this: int) -> Report:
        planner = FaultyPlanner("finish_plan") if this == rank else None
        writer = place.writer()
        with pytest.raises(CheckpointException):
            dcp.save(some_state(place), storage_writer=writer, planner=planner)
        dist.barrier()
        if clean_up == "abort":
            writer.abort()
        else:
            save_and_load(place, writer)
        return attempt(place, lambda: None, lambda: True)

    for report in pool(save):
        assert report.pending == frozenset()
        if clean_up == "abort":
            assert report.visible == frozenset()
    if clean_up == "next save":
        ids = {name.split(".")[1] for name in place.visible() if name.endswith(".distcp")}
        assert len(ids) == RANKS  # one a rank, of the save that loads; none of the one that failed


def test_an_existing_checkpoint_is_untouched_by_a_failed_overwrite(pool: RankPool, place: Place) -> None:
    def save_twice(rank: int) -> tuple[Report, frozenset[str]]:
        dcp.save(some_state(place), storage_writer=place.writer())
        dist.barrier()
        before = frozenset(place.visible())
        report = save_with_fault(rank, place, Fault("upload_part", 1, 2), overwrite=True)
        loaded = blank(place)
        dcp.load(loaded, storage_reader=place.reader())
        states.assert_bit_exact(loaded, some_state(place))
        return report, before

    for report, before in pool(save_twice):
        chains = [causes(failure) for failure in report.failures]
        assert all(any(isinstance(cause, InjectedFault) for cause in chain) for chain in chains)
        assert report.visible == before
        assert report.pending == frozenset()
