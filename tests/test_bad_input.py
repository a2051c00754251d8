"""What users get wrong, or find broken: one clear error on every rank, soon, and nothing left behind."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import cloudckpt
from cloudckpt.backends.errors import (
    AccessDeniedError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConfigurationError,
    IntegrityError,
    StorageError,
    UnsafeCheckpointError,
)
from support import states
from support.answers import ACCESS_DENIED, WELCOME, answering
from support.places import FOLDER_PART_SIZE, Place
from support.ranks import RankPools
from support.servers import S3Server, unused_port

pytestmark = [
    pytest.mark.timeout(90),  # minutes of retries on a final answer fail here
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

SECRET = "do-not-show-me"  # noqa: S105 - a stand-in


@pytest.fixture
def saved(place: Place) -> Place:
    save(place)
    return place


def some_state() -> states.State:
    return {"weight": states.content("weight", (200, 300), torch.float32), "step": 3}


def blank() -> states.State:
    return {"weight": torch.zeros(200, 300), "step": 0}


def save(place: Place, **options: Any) -> None:
    dcp.save(some_state(), storage_writer=place.writer(**options))


def load(place: Place, state: states.State | None = None, **options: Any) -> states.State:
    target = blank() if state is None else state
    dcp.load(target, storage_reader=place.reader(**options))
    return target


def failure_of(call: Callable[[], Any]) -> BaseException:
    """Return the one failure that a single process's save or load raised."""
    with pytest.raises(CheckpointException) as caught:
        call()
    ((failure, _),) = caught.value.failures.values()
    return failure


def assert_explained(
    failure: BaseException, kind: type[CheckpointError], place: Place, rank: int = 0
) -> None:
    """The contract: what happened, to which URI, object and rank, and what to do."""
    assert isinstance(failure, kind), repr(failure)
    assert failure.uri is not None
    assert failure.uri.startswith(place.uri)
    assert failure.rank == rank
    assert failure.hint
    text = str(failure)
    assert place.uri in text
    assert f"rank {rank}" in text
    assert failure.hint in text


def only_data_object(place: Place) -> str:
    (name,) = (name for name in place.visible() if name.endswith(".distcp"))
    return name


# --- reaching the store


@pytest.fixture(params=["save", "load"])
def attempt(request: pytest.FixtureRequest) -> Callable[[Place], Any]:
    attempts: dict[str, Callable[[Place], Any]] = {"save": save, "load": load}
    return attempts[request.param]


@pytest.mark.parametrize("server_name", ["moto", "ministack", "rclone"])
def test_a_bucket_that_is_not_there(
    attempt: Callable[[Place], Any], s3_server_named: Callable[[str], S3Server], server_name: str
) -> None:
    place = Place.on_server(s3_server_named(server_name), "no-such-bucket-anywhere").child("run")
    failure = failure_of(lambda: attempt(place))
    assert isinstance(failure, FileNotFoundError)
    assert_explained(failure, CheckpointError, place)
    assert "no-such-bucket-anywhere" in str(failure)


def test_wrong_credentials(attempt: Callable[[Place], Any], rclone: S3Server) -> None:
    right = Place.on_server(rclone, rclone.new_bucket()).child("run")
    wrong = {**right.options, "storage_options": {"key": "test", "secret": SECRET}}
    place = Place(right.name, right.uri, rclone, wrong)
    failure = failure_of(lambda: attempt(place))
    assert_explained(failure, AccessDeniedError, place)
    assert SECRET not in str(failure)
    assert right.visible() == set()


def test_no_permission(attempt: Callable[[Place], Any], moto: S3Server) -> None:
    with answering(403, ACCESS_DENIED, "application/xml") as endpoint:
        options = {**Place.on_server(moto, "bucket").options, "endpoint_url": endpoint}
        place = Place("refusing", "s3://bucket/run", moto, options)
        assert_explained(failure_of(lambda: attempt(place)), AccessDeniedError, place)


@pytest.mark.parametrize(("status", "body"), [(200, WELCOME), (404, WELCOME), (405, WELCOME), (200, b"")])
def test_an_endpoint_that_is_not_s3(
    attempt: Callable[[Place], Any], moto: S3Server, status: int, body: bytes
) -> None:
    with answering(status, body, "text/html") as endpoint:
        options = {**Place.on_server(moto, "bucket").options, "endpoint_url": endpoint}
        place = Place("not S3", "s3://bucket/run", moto, options)
        assert_explained(failure_of(lambda: attempt(place)), CheckpointError, place)


def test_an_endpoint_that_refuses(attempt: Callable[[Place], Any], moto: S3Server) -> None:
    endpoint = f"http://127.0.0.1:{unused_port()}"
    options = {**Place.on_server(moto, "bucket").options, "endpoint_url": endpoint, "retries": 1}
    place = Place("refusing", "s3://bucket/run", moto, options)
    failure = failure_of(lambda: attempt(place))
    assert_explained(failure, StorageError, place)
    assert endpoint in str(failure)


def test_a_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    place = Place.in_folder(tmp_path / "file" / "run")
    assert_explained(failure_of(lambda: save(place)), StorageError, place)
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    place = Place.in_folder(tmp_path / "run")
    assert_explained(failure_of(lambda: save(place)), AccessDeniedError, place)


@pytest.mark.parametrize("make", [cloudckpt.StorageWriter, cloudckpt.StorageReader])
@pytest.mark.parametrize("uri", ["", "s3://", "s3:/bucket/run", "s3://buc ket/run", "s4://bucket/run"])
def test_a_uri_with_a_typo_is_refused_when_it_is_given(make: Callable[..., Any], uri: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make(uri)
    assert caught.value.hint


@pytest.mark.parametrize("make", [cloudckpt.StorageWriter, cloudckpt.StorageReader])
def test_an_unknown_option_is_refused_with_the_nearest_name(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match="part_size"):
        make("memory://run", part_sizes="5MiB")
    with pytest.raises(ConfigurationError, match="part_size"):
        make("memory://run?part_sizes=5MiB")


@pytest.mark.parametrize("name", ["key", "secret", "token"])
def test_a_credential_in_a_uri_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(ConfigurationError, match="storage_options") as caught:
        cloudckpt.StorageWriter(f"s3://bucket/run?{name}={SECRET}")
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)


def test_parts_smaller_than_the_store_takes(moto: S3Server) -> None:
    place = Place.on_server(moto, moto.new_bucket()).child("run")
    failure = failure_of(lambda: save(place, part_size="1MiB"))
    assert_explained(failure, ConfigurationError, place)
    assert place.visible() == place.pending() == set()


# --- what is there, and what is not


def test_a_checkpoint_that_is_not_there(place: Place) -> None:
    failure = failure_of(lambda: load(place))
    assert_explained(failure, CheckpointNotFoundError, place)
    assert place.visible() == set()


def test_a_checkpoint_that_is_there_already(saved: Place) -> None:
    before = {name: saved.read(name) for name in saved.visible()}
    assert_explained(failure_of(lambda: save(saved)), CheckpointExistsError, saved)
    assert {name: saved.read(name) for name in saved.visible()} == before
    assert saved.pending() == set()
    save(saved, overwrite=True)
    states.assert_bit_exact(load(saved), some_state())
    assert len(saved.visible()) == len(before)


def test_an_object_that_is_missing(saved: Place) -> None:
    name = only_data_object(saved)
    saved.remove(name)
    failure = failure_of(lambda: load(saved))
    assert_explained(failure, IntegrityError, saved)
    assert isinstance(failure, IntegrityError)
    assert failure.object_name == name


@pytest.mark.parametrize("left", [0, 1000, -1])
def test_an_object_that_is_short(saved: Place, left: int) -> None:
    name = only_data_object(saved)
    if left < 0 and saved.is_gcs:
        left -= FOLDER_PART_SIZE  # objects there end in zeros, which nobody misses
    saved.write(name, saved.read(name)[:left])
    failure = failure_of(lambda: load(saved))
    assert_explained(failure, IntegrityError, saved)
    assert isinstance(failure, IntegrityError)
    assert failure.object_name == name


def test_an_object_missing_for_one_rank_fails_every_rank_and_names_that_one(
    rank_pool: RankPools, place: Place
) -> None:
    def save_by_rank(rank: int) -> None:
        state = {f"of rank {rank}": states.content("by rank", (64, rank + 1), torch.float32)}
        dcp.save(state, storage_writer=place.writer())

    def load_by_rank(rank: int) -> dict[int, BaseException]:
        state = {f"of rank {rank}": torch.zeros(64, rank + 1)}
        with pytest.raises(CheckpointException) as caught:
            dcp.load(state, storage_reader=place.reader())
        return {failed: failure for failed, (failure, _) in caught.value.failures.items()}

    rank_pool(2)(save_by_rank)
    (name,) = (name for name in place.visible() if name.startswith("__1_"))
    place.remove(name)
    for failures in rank_pool(2)(load_by_rank):
        assert set(failures) == {1}
        assert_explained(failures[1], IntegrityError, place, rank=1)
        assert name in str(failures[1])


@pytest.mark.parametrize("damage", [b"", b"not a pickle", None])
def test_metadata_that_is_damaged(saved: Place, damage: bytes | None) -> None:
    saved.write(".metadata", saved.read(".metadata")[:-20] if damage is None else damage)
    failure = failure_of(lambda: load(saved))
    assert_explained(failure, IntegrityError, saved)
    assert isinstance(failure, IntegrityError)
    assert failure.object_name == ".metadata"


class Hostile:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.putenv, ("CLOUDCKPT_TEST_HOSTILE", "ran"))


def test_metadata_that_would_run_code(saved: Place) -> None:
    saved.write(".metadata", pickle.dumps({"state_dict_metadata": Hostile()}))
    failure = failure_of(lambda: load(saved))
    assert_explained(failure, UnsafeCheckpointError, saved)
    assert "putenv" in str(failure)


def test_a_value_that_would_run_code(place: Place) -> None:
    dcp.save({**some_state(), "step": Hostile()}, storage_writer=place.stock_writer())
    failure = failure_of(lambda: load(place))
    assert_explained(failure, UnsafeCheckpointError, place)


def test_a_value_of_an_unknown_class_loads_with_trust_alone(place: Place) -> None:
    value = threading.Barrier  # a class, by name: harmless, and nothing that weights_only lets through
    dcp.save({**some_state(), "step": value}, storage_writer=place.writer())
    assert_explained(failure_of(lambda: load(place)), UnsafeCheckpointError, place)
    assert load(place, trust=True)["step"] is value


# --- the state


def test_a_value_that_cannot_be_saved(place: Place) -> None:
    state = {**some_state(), "lock": threading.Lock()}
    failure = failure_of(lambda: dcp.save(state, storage_writer=place.writer()))
    assert_explained(failure, ConfigurationError, place)
    assert "lock" in str(failure)
    assert place.visible() == place.pending() == set()


def test_a_value_that_cannot_be_saved_on_one_rank_fails_every_rank(
    rank_pool: RankPools, place: Place
) -> None:
    def save_lock(rank: int) -> list[BaseException]:
        state: states.State = some_state()
        if rank == 1:
            state["lock of rank 1"] = threading.Lock()
        with pytest.raises(CheckpointException) as caught:
            dcp.save(state, storage_writer=place.writer())
        return [failure for failure, _ in caught.value.failures.values()]

    for failures in rank_pool(2)(save_lock):
        (failure,) = failures
        assert_explained(failure, ConfigurationError, place, rank=1)
        assert "lock of rank 1" in str(failure)
    assert place.visible() == place.pending() == set()


def test_a_tensor_of_another_shape(saved: Place) -> None:
    failure = failure_of(lambda: load(saved, {"weight": torch.zeros(300, 200), "step": 0}))
    assert_explained(failure, ConfigurationError, saved)
    assert "'weight' has size (300, 200) in the state and (200, 300) in the checkpoint" in str(failure)


def test_a_tensor_that_the_checkpoint_does_not_have(saved: Place) -> None:
    """DCP's planner raises before the reader is asked: its error names the tensor, and can't name the URI."""
    failure = failure_of(lambda: load(saved, {**blank(), "other": torch.zeros(1)}))
    assert isinstance(failure, RuntimeError)
    assert "other" in str(failure)
