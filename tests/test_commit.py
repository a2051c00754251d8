"""The put of `.metadata` is settled one way or the other, also when its answer is lost."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from cloudckpt.backends.config.options import Options
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import (
    CheckpointExistsError,
    CommitError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    UnansweredError,
    UncertainCommitError,
)
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.save import commit
from cloudckpt.backends.save.commit import Previous, put_metadata
from cloudckpt.backends.save.uploader import StagedObject
from cloudckpt.backends.stores.base import (
    Capabilities,
    Condition,
    Create,
    Listing,
    ObjectInfo,
    ObjectStore,
    Overwrite,
    Part,
    Update,
    Upload,
)
from cloudckpt.backends.stores.memory import MemoryStore

NAME = ".metadata"


def metadata_of(save_id: str) -> bytes:
    metadata = Metadata({}, storage_data={})
    md.add_extras(metadata, save_id, "0", {})
    return md.dump(metadata)


class Unreliable(MemoryStore):
    """A memory store whose next put fails before or after it acts, and whose reads may fail too."""

    before: Exception | None = None
    after: Exception | None = None
    reads: Exception | None = None
    conditional: bool = True

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        if self.before is not None:
            raise self.before
        info = super().put(name, data, condition)
        if self.after is not None:
            raise self.after
        return info

    def get(self, name: str) -> tuple[bytes, ObjectInfo]:
        if self.reads is not None:
            raise self.reads
        return super().get(name)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(conditional_create=self.conditional, conditional_update=self.conditional)


@pytest.fixture
def store() -> Unreliable:
    return Unreliable(Target.parse(f"memory://commit-{uuid.uuid4().hex}"))


def committed(store: ObjectStore) -> str | None:
    try:
        return md.save_id_of(md.load(store.get(NAME)[0], uri=store.uri))
    except ObjectNotFoundError:
        return None


def test_a_commit_makes_the_metadata_visible(store: Unreliable) -> None:
    put_metadata(store, NAME, metadata_of("a"), "a", None)
    assert committed(store) == "a"


def test_the_second_of_two_commits_is_told_that_it_lost(store: Unreliable) -> None:
    put_metadata(store, NAME, metadata_of("a"), "a", None)
    with pytest.raises(CheckpointExistsError) as caught:
        put_metadata(store, NAME, metadata_of("b"), "b", None)
    assert committed(store) == "a"
    assert caught.value.uri == store.uri


def test_an_overwrite_loses_against_another_that_came_first(store: Unreliable) -> None:
    put_metadata(store, NAME, metadata_of("old"), "old", None)
    previous = commit.find_previous(store, NAME)
    assert previous is not None
    put_metadata(store, NAME, metadata_of("a"), "a", previous)
    with pytest.raises(CheckpointExistsError):
        put_metadata(store, NAME, metadata_of("b"), "b", previous)
    assert committed(store) == "a"


def test_a_lost_answer_to_a_commit_that_happened_is_a_success(store: Unreliable) -> None:
    store.after = UnansweredError("cut")
    put_metadata(store, NAME, metadata_of("a"), "a", None)
    store.after = None
    assert committed(store) == "a"


def test_a_refused_commit_that_did_not_happen_is_a_failure(store: Unreliable) -> None:
    store.before = StorageError("no")
    with pytest.raises(CommitError) as caught:
        put_metadata(store, NAME, metadata_of("a"), "a", None)
    assert not isinstance(caught.value, UncertainCommitError)


@pytest.mark.parametrize("error", [StorageError("fsync failed"), RuntimeError("a plug-in's own")], ids=str)
def test_a_commit_that_is_there_although_the_store_failed_is_no_success(
    store: Unreliable, error: Exception
) -> None:
    """It is there now, and may not be after a power cut."""
    store.after = error
    with pytest.raises(UncertainCommitError):
        put_metadata(store, NAME, metadata_of("a"), "a", None)
    assert committed(store) == "a"


def test_an_unanswered_commit_that_is_not_there_yet_is_uncertain(store: Unreliable) -> None:
    store.before = UnansweredError("cut")
    with pytest.raises(UncertainCommitError):
        put_metadata(store, NAME, metadata_of("a"), "a", None)


def test_an_unanswered_overwrite_under_another_save_s_metadata_has_lost(store: Unreliable) -> None:
    """Its version never returns, so that it can't be obeyed any more."""
    put_metadata(store, NAME, metadata_of("old"), "old", None)
    previous = commit.find_previous(store, NAME)
    put_metadata(store, NAME, metadata_of("other"), "other", previous)
    store.before = UnansweredError("cut")
    with pytest.raises(CheckpointExistsError):
        put_metadata(store, NAME, metadata_of("a"), "a", previous)


def test_an_unanswered_create_under_another_save_s_metadata_is_uncertain(store: Unreliable) -> None:
    """Once the other is deleted it would be obeyed."""
    put_metadata(store, NAME, metadata_of("other"), "other", None)
    store.before = UnansweredError("cut")
    with pytest.raises(UncertainCommitError):
        put_metadata(store, NAME, metadata_of("a"), "a", None)


def test_a_refused_overwrite_of_what_is_there_unchanged_is_a_failure(store: Unreliable) -> None:
    put_metadata(store, NAME, metadata_of("old"), "old", None)
    previous = commit.find_previous(store, NAME)
    store.before = StorageError("no")
    with pytest.raises(CommitError) as caught:
        put_metadata(store, NAME, metadata_of("a"), "a", previous)
    assert type(caught.value) is CommitError
    assert committed(store) == "old"


def test_an_overwrite_of_what_was_deleted_meanwhile_says_so(store: Unreliable) -> None:
    put_metadata(store, NAME, metadata_of("old"), "old", None)
    previous = commit.find_previous(store, NAME)
    store.delete([NAME])
    with pytest.raises(CommitError, match="deleted"):
        put_metadata(store, NAME, metadata_of("a"), "a", previous)


def test_an_unanswered_overwrite_whose_turn_may_still_come_is_uncertain(store: Unreliable) -> None:
    put_metadata(store, NAME, metadata_of("old"), "old", None)
    previous = commit.find_previous(store, NAME)
    store.before = UnansweredError("cut")
    with pytest.raises(UncertainCommitError):
        put_metadata(store, NAME, metadata_of("a"), "a", previous)


def test_an_unanswered_put_without_a_condition_is_uncertain_whatever_is_there(store: Unreliable) -> None:
    store.conditional = False
    put_metadata(store, NAME, metadata_of("old"), "old", None)
    previous = commit.find_previous(store, NAME)
    store.before = UnansweredError("cut")
    with pytest.raises(UncertainCommitError):
        put_metadata(store, NAME, metadata_of("a"), "a", previous)


def test_a_lost_precondition_that_cannot_be_read_back_is_uncertain(store: Unreliable) -> None:
    """It may be our own first try that won."""
    store.before, store.reads = PreconditionFailedError("412"), StorageError("down")
    with pytest.raises(UncertainCommitError):
        put_metadata(store, NAME, metadata_of("a"), "a", None)


def test_a_commit_that_cannot_be_read_back_is_uncertain(store: Unreliable) -> None:
    store.after, store.reads = StorageError("500"), StorageError("down")
    with pytest.raises(UncertainCommitError):
        put_metadata(store, NAME, metadata_of("a"), "a", None)


def test_a_precondition_lost_to_our_own_first_try_is_a_success(store: Unreliable) -> None:
    super(Unreliable, store).put(NAME, metadata_of("a"), Create())
    put_metadata(store, NAME, metadata_of("a"), "a", None)
    assert committed(store) == "a"


def test_without_conditions_a_commit_checks_first_and_says_so_once(
    store: Unreliable, caplog: pytest.LogCaptureFixture
) -> None:
    store.conditional = False
    put_metadata(store, NAME, metadata_of("a"), "a", None)
    with pytest.raises(CheckpointExistsError):
        put_metadata(store, NAME, metadata_of("b"), "b", None)
    previous = commit.find_previous(store, NAME)
    put_metadata(store, NAME, metadata_of("c"), "c", previous)
    assert committed(store) == "c"
    other = Unreliable(Target.parse(f"{store.uri}/another-step"))
    other.conditional = False
    put_metadata(other, NAME, metadata_of("d"), "d", None)
    assert [r.getMessage() for r in caplog.records if "conditional puts" in r.getMessage()].__len__() == 1


class Recording(MemoryStore):
    """A memory store that remembers the conditions it was given."""

    conditions: list[Condition]

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        self.conditions.append(condition)
        return super().put(name, data, condition)


def test_the_commit_is_one_conditional_put() -> None:
    store = Recording(Target.parse(f"memory://commit-{uuid.uuid4().hex}"))
    store.conditions = []
    put_metadata(store, NAME, metadata_of("a"), "a", None)
    previous = commit.find_previous(store, NAME)
    assert previous is not None
    put_metadata(store, NAME, metadata_of("b"), "b", previous)
    assert store.conditions == [Create(), Update(previous.version)]
    assert Overwrite() not in store.conditions


def staged(store: ObjectStore, name: str, data: bytes) -> StagedObject:
    upload = store.begin_upload(name)
    return StagedObject(upload, (store.upload_part(upload, 1, 0, [memoryview(data)]),))


def test_publish_makes_every_object_visible_and_reports_its_size(store: Unreliable) -> None:
    objects = commit.publish(store, [staged(store, f"o{i}", b"x" * i) for i in range(1, 4)], 2)
    assert {name: info.size for name, info in objects.items()} == {"o1": 1, "o2": 2, "o3": 3}


@pytest.mark.parametrize(
    ("concurrency", "ranks", "most"), [(8, 1, 8), (2, 3, 6), (8, 4096, 64), (100, 9, 100)]
)
def test_the_coordinator_has_as_many_requests_as_the_ranks_could_have(
    concurrency: int, ranks: int, most: int
) -> None:
    assert commit.at_once(Options.model_validate({"concurrency": concurrency}), ranks) == most


class Slow(MemoryStore):
    """A memory store that takes its time to complete an upload, and notes how many it has at hand at most."""

    _lock = threading.Lock()
    now = most = 0

    def complete_upload(self, upload: Upload, parts: Sequence[Part], *, confirm: bool = True) -> ObjectInfo:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.05)  # a store that takes its time is what is tested
        with self._lock:
            self.now -= 1
        return super().complete_upload(upload, parts, confirm=confirm)


@pytest.mark.parametrize("allowed", [3, 64])
def test_more_uploads_are_completed_at_once_where_they_wait_but_no_more_than_allowed(allowed: int) -> None:
    store = Slow(Target.parse(f"memory://commit-{uuid.uuid4().hex}"))
    ours = [staged(store, f"__{i}_0.distcp", b"abc") for i in range(3 * allowed)]
    assert len(commit.publish(store, ours, allowed)) == 3 * allowed
    assert (store.most <= 3) if allowed == 3 else (16 <= store.most <= 64)


class Shrinking(MemoryStore):
    """A memory store that completes an upload and reports less than was sent."""

    def complete_upload(self, upload: Upload, parts: Sequence[Part], *, confirm: bool = True) -> ObjectInfo:
        info = super().complete_upload(upload, parts, confirm=confirm)
        return ObjectInfo(info.name, info.size - 1, info.version)


def test_an_object_that_came_out_short_stops_the_commit() -> None:
    store = Shrinking(Target.parse(f"memory://commit-{uuid.uuid4().hex}"))
    with pytest.raises(CommitError, match="holds 2 bytes of an object of 3") as caught:
        commit.publish(store, [staged(store, "o", b"abc")], 1)
    assert caught.value.object_name == "o"


class Trusting(MemoryStore):
    """A memory store that takes a completion at its word unless asked, and whose listing may be wrong."""

    hidden: frozenset[str] = frozenset()
    cut: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()

    def complete_upload(self, upload: Upload, parts: Sequence[Part], *, confirm: bool = True) -> ObjectInfo:
        assert not confirm, "so many objects are listed"
        info = super().complete_upload(upload, parts)
        if info.name in self.gone:
            self.delete([info.name])
        return info

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        found = super().list(prefix, delimiter=delimiter).objects
        shown = (info for info in found if info.name not in self.hidden)
        return Listing(tuple(replace(one, size=one.size - (one.name in self.cut)) for one in shown))


def trusting(count: int = 100) -> tuple[Trusting, list[StagedObject]]:
    store = Trusting(Target.parse(f"memory://commit-{uuid.uuid4().hex}"))
    return store, [staged(store, f"__{i}_0.distcp", b"abc") for i in range(count)]


def test_the_sizes_of_many_objects_are_told_by_a_listing() -> None:
    store, objects = trusting()
    assert len(commit.publish(store, objects, 4)) == 100
    store, objects = trusting()
    store.hidden = frozenset({"__7_0.distcp"})
    assert len(commit.publish(store, objects, 4)) == 100, "a listing that lags is no reason to give up"


@pytest.mark.parametrize(("what", "said"), [("cut", "holds 2 bytes of an object of 3"), ("gone", "is gone")])
def test_one_of_many_objects_that_is_not_whole_stops_the_commit(what: str, said: str) -> None:
    store, objects = trusting()
    setattr(store, what, frozenset({"__7_0.distcp"}))
    with pytest.raises(CommitError, match=said) as caught:
        commit.publish(store, objects, 4)
    assert caught.value.object_name == "__7_0.distcp"


@pytest.mark.parametrize("how", ["open", "completed", "aborted"])
def test_withdraw_removes_objects_in_whatever_state(store: Unreliable, how: str) -> None:
    one = staged(store, "o", b"abc")
    after: dict[str, Callable[[], object]] = {
        "open": lambda: None,
        "completed": lambda: store.complete_upload(one.upload, one.parts),
        "aborted": lambda: store.abort_upload(one.upload),
    }
    after[how]()
    commit.withdraw(store, [one], 2)
    assert store.list().objects == ()
    assert list(store.pending_uploads()) == []


def test_previous_remembers_what_it_consists_of(store: Unreliable) -> None:
    assert commit.find_previous(store, NAME) is None
    data = metadata_of("a")
    info = store.put(NAME, data, Create())
    assert commit.find_previous(store, NAME) == Previous(info.version or "", frozenset(), data)
