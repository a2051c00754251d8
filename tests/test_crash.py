"""A save whose processes are killed, at any call: readers see the old checkpoint or the new one, whole."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.backends.errors import CommitError, StorageError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.manage.gc import Garbage, collect_garbage
from cloudckpt.backends.save.save_lease import MARKER
from support.crash import RANKS, Call, Ended, Fate, Job, Moment, Zygote, committed, content_of, new_zygote
from support.places import FOLDER, SOAKED, USUAL, Place, new_place
from support.servers import S3Server

NOW = timedelta(0)
PART_SIZE = 4 << 10
"""Bytes, in a folder. On a server the parts are as small as it allows."""
COMMITS = {Call(how, md.METADATA_NAME) for how in ("put", "os.link", "os.rename")}
"""The call that is the commit, and the steps inside it, of a new checkpoint and of an overwritten one."""

Counted = list[tuple[Call, ...]]
Places = Callable[[str], Place]


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with new_zygote() as started:
        yield started


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory, s3_server_named: Callable[[str], S3Server]) -> Places:
    """A factory of untouched places by name."""

    def make(name: str) -> Place:
        place = new_place(name, tmp_path_factory.mktemp("place"), s3_server_named)
        return replace(place, options={**place.options, "part_size": PART_SIZE}) if name == FOLDER else place

    return make


def calls_of(zygote: Zygote, job: Job) -> Counted:
    """Return the calls of every rank in an undisturbed save like ``job``."""
    beside = replace(job, place=job.place.child("counted"))
    if job.overwrite:
        zygote.save_well(replace(beside, content="overwritten", overwrite=False))
    return [ended.calls for ended in zygote.save_well(beside)]


def moments(counted: Counted, job: Job) -> list[Moment]:
    """Return every moment at which a save like ``job`` may be killed."""
    return [
        Moment(rank, call, after)
        for rank, calls in enumerate(counted)
        for call in range(1, len(calls) + 1)
        # Steps inside are heard of when they are about to be taken; the next one comes after.
        for after in ([False] if job.inside else [False, True])
    ]


def stops(counted: Counted, job: Job) -> list[Moment]:
    """Return every moment between two calls, once."""
    return [moment for moment in moments(counted, job) if moment.after]


def commit_of(counted: Counted) -> int:
    """Return which call of the coordinator puts the metadata."""
    return next(at for at, call in enumerate(counted[0], 1) if call in COMMITS)


def commits(counted: Counted, moment: Moment) -> bool:
    """Say whether the metadata was put when this moment came."""
    put = commit_of(counted)
    return moment.rank == 0 and (moment.call > put or (moment.call == put and moment.after))


def is_staging(counted: Counted, moment: Moment) -> bool:
    """Say whether no upload was completed yet when this moment came."""
    first = [call.operation for call in counted[0]].index("complete_upload") + 1
    return moment.rank != 0 or moment.call < first or (moment.call == first and not moment.after)


def collect(place: Place, silent_for: timedelta | None = None) -> Garbage:
    given: dict[str, Any] = {} if silent_for is None else {"silent_for": silent_for}
    return collect_garbage(place.uri, older_than=NOW, **given, **place.options)


def assert_exact(place: Place) -> None:
    """Assert that nothing is there but what the checkpoint consists of."""
    assert place.visible() == committed(place)
    assert place.pending() == set()


def assert_died(ended: list[Ended], job: Job) -> None:
    for rank, one in enumerate(ended):
        if job.fate is Fate.JOB_DIES or (job.moment is not None and rank == job.moment.rank):
            assert one.exit_code == -signal.SIGKILL, one
        else:
            assert one.exit_code == 0, one
            assert one.failures, "a rank that lost the other one reported success"


def kill_and_recover(
    zygote: Zygote, job: Job, expected: str | None, following: str, *, staging: bool = False
) -> None:
    """Kill a save and look for the expected content; save again, and collect what is left.

    A save that was ``staging`` has made none of its objects visible.
    """
    place = job.place
    assert_died(zygote.save(job), job)
    assert content_of(place, job.tensors) == expected
    if staging:
        there = {name for name in place.visible() if name.endswith(md.DATA_SUFFIX)}
        assert there == (committed(place) - {md.METADATA_NAME} if expected is not None else set())
    again = replace(job, content=following, overwrite=expected is not None, moment=None)
    zygote.save_well(again)
    assert content_of(place, job.tensors) == following
    collect(place, NOW)
    assert_exact(place)


def kill_at_every_call(zygote: Zygote, job: Job) -> tuple[int, Counted]:
    """Run a save like ``job`` for every moment; return how many runs there were, and the calls counted."""
    counted = calls_of(zygote, job)
    runs, place, content = 0, job.place.child("overwritten"), "0"
    if job.overwrite:
        zygote.save_well(replace(job, place=place, content=content, overwrite=False))
    for moment in moments(counted, job):
        # What one run leaves, the next one overwrites: three contents are enough for them to differ.
        old, new, following = (str((int(content) + n) % 3) for n in range(3))
        expected = new if commits(counted, moment) else old if job.overwrite else None
        if not job.overwrite:
            place = job.place.child(f"run-{runs}")
        try:
            killed = replace(job, place=place, content=new, moment=moment)
            staging = not job.inside and is_staging(counted, moment)
            kill_and_recover(zygote, killed, expected, following, staging=staging)
        except BaseException as error:
            error.add_note(f"{job.fate.value} at {counted[moment.rank][moment.call - 1]}: {moment}")
            raise
        content = following
        runs += 1
    return runs, counted


def check_every_call(zygote: Zygote, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    runs, counted = kill_at_every_call(zygote, job)
    calls, seconds = [len(made) for made in counted], time.monotonic() - began
    where = f"at {calls} steps inside the" if job.inside else f"before and after {calls}"
    with capsys.disabled():
        print(f"\n{job.place.name}: {runs} saves killed {where} calls of its ranks, {seconds:.0f} s")  # noqa: T201
    assert runs == sum(calls) * (1 if job.inside else 2)


overwriting = pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwritten"])
dying = pytest.mark.parametrize("fate", [Fate.RANK_DIES, Fate.JOB_DIES], ids=["a rank dies", "all die"])


@overwriting
@dying
def test_a_save_killed_at_any_call_leaves_the_old_checkpoint_or_the_new_one(
    zygote: Zygote, new: Places, fate: Fate, overwrite: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    check_every_call(zygote, Job(new(FOLDER), "", overwrite, fate=fate), capsys)


@overwriting
def test_a_save_killed_at_any_step_inside_the_calls_of_a_folder_leaves_the_old_checkpoint_or_the_new_one(
    zygote: Zygote, new: Places, overwrite: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(new(FOLDER), "", overwrite, fate=Fate.JOB_DIES, inside=True)
    check_every_call(zygote, job, capsys)


def test_a_save_that_deletes_the_old_checkpoint_before_the_commit_is_found_out(
    zygote: Zygote, new: Places
) -> None:
    """What these tests are for: killed right before its commit, such a save leaves nothing that loads."""
    job = Job(new(FOLDER), "new", overwrite=True, hasty=True)
    commit = commit_of(calls_of(zygote, job))
    zygote.save_well(replace(job, content="old", overwrite=False))
    killed = replace(job, moment=Moment(0, commit, after=False))
    with pytest.raises(CheckpointException, match="IntegrityError"):
        kill_and_recover(zygote, killed, "old", "following")


def stopped_and_collected(
    zygote: Zygote, job: Job, silent_for: timedelta | None = None
) -> tuple[list[Ended], Garbage]:
    """Stop a save at its moment, collect garbage, wake it, and return how it ended and what was collected."""
    assert job.moment is not None
    with zygote.started(job) as running:
        running.await_stop(job.moment.rank)
        before = job.place.visible() | job.place.pending()
        garbage = collect(job.place, silent_for)
        if silent_for is None:
            assert before <= job.place.visible() | job.place.pending()
        running.wake(job.moment.rank)
        return running.ended(), garbage


@overwriting
def test_garbage_collection_takes_nothing_of_a_save_in_progress_which_then_commits(
    zygote: Zygote, new: Places, overwrite: bool
) -> None:
    job = Job(new(FOLDER), "new", overwrite, fate=Fate.STOPS)
    for moment in stops(calls_of(zygote, job), job):
        place = job.place.child(f"{moment.rank}-{moment.call}")
        if overwrite:
            zygote.save_well(Job(place, "old"))
        ended, garbage = stopped_and_collected(zygote, replace(job, place=place, moment=moment))
        assert garbage == Garbage((), (), 0), moment
        assert [one.failures for one in ended] == [()] * RANKS, moment
        assert content_of(place) == "new"
        assert_exact(place)


@overwriting
def test_a_save_that_wakes_after_it_was_taken_for_dead_fails_and_leaves_nothing(
    zygote: Zygote, new: Places, overwrite: bool
) -> None:
    job = Job(new(FOLDER), "new", overwrite, fate=Fate.STOPS)
    counted = calls_of(zygote, job)
    puts = [(at, call) for at, call in enumerate(counted[0], 1) if call.operation == "put"]
    marked = next(at for at, call in puts if is_marker(call))
    committed = next(at for at, call in puts if call.name == md.METADATA_NAME)
    for moment in stops(counted, job):
        if moment.rank == 0 and not marked <= moment.call < committed:
            continue  # there is nothing yet, or it is committed
        place = job.place.child(f"{moment.rank}-{moment.call}")
        if overwrite:
            zygote.save_well(Job(place, "old"))
        ended, garbage = stopped_and_collected(zygote, replace(job, place=place, moment=moment), NOW)
        assert len(garbage.traces) == 1, moment
        # A rank that was still sending is told first, by a store that no longer knows its upload.
        sending = counted[moment.rank][moment.call - 1].operation in ("begin_upload", "upload_part")
        for one in ended:
            assert one.failures, moment
            for failure in one.failures:
                assert isinstance(failure, StorageError if sending else CommitError), failure
        if overwrite:
            assert content_of(place) == "old"
            assert_exact(place)
        else:
            assert place.visible() | place.pending() == set(), moment


def is_marker(call: Call) -> bool:
    return call.name is not None and MARKER.fullmatch(call.name) is not None


@pytest.mark.soak
@pytest.mark.timeout(0)
@overwriting
@dying
@pytest.mark.parametrize("where", [*USUAL, *SOAKED])
def test_a_save_killed_at_any_call_on_any_store_leaves_the_old_checkpoint_or_the_new_one(
    zygote: Zygote,
    new: Places,
    *,
    where: str,
    fate: Fate,
    overwrite: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = Job(new(where), "", overwrite, fate=fate)
    if where == FOLDER:
        job = replace(job, tensors=4, concurrency=2)  # two objects a rank, and requests side by side
    check_every_call(zygote, job, capsys)
