"""``dcp.save`` and stock ``dcp.async_save``, by thread and by process: every option is kept on the way."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.tensor import Shard

import cloudckpt
from cloudckpt.backends.errors import CheckpointExistsError
from support import states
from support.places import Place
from support.ranks import RankPool, RankPools

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

RANKS = 2
FORMS = (AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS)


@pytest.fixture
def pool(rank_pool: RankPools) -> RankPool:
    return rank_pool(RANKS)


def some_state() -> states.State:
    mesh = states.world_mesh()
    return {
        "sharded": states.distributed("sharded", (12, 1 << 18), torch.float32, mesh, Shard(0)),
        "step": 7,
        "training": states.training_state(mesh),
    }


def compare_with_saved(place: Place) -> None:
    expected = some_state()
    loaded: states.State = states.erase(some_state())
    dcp.load(loaded, storage_reader=place.reader())
    states.assert_bit_exact(loaded, expected)


def save_async(state: states.State, form: AsyncCheckpointerType, **arguments: Any) -> Any:
    """Save in the background and wait for the end; ``async_save`` gives a future in either form."""
    saving = dcp.async_save(state, async_checkpointer_type=form, **arguments)
    future = saving.upload_completion if isinstance(saving, AsyncSaveResponse) else saving
    return future.result(timeout=100)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.value)
def test_async_save_commits_what_the_state_was(
    pool: RankPool, place: Place, form: AsyncCheckpointerType
) -> None:
    def save(_rank: int) -> None:
        writer = place.writer()
        save_async(some_state(), form, storage_writer=writer)
        dist.barrier()
        compare_with_saved(place)

    pool(save)
    assert place.pending() == set()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.value)
def test_async_save_with_a_checkpoint_id_keeps_every_option(
    pool: RankPool, place: Place, form: AsyncCheckpointerType
) -> None:
    """Endpoint and credentials must arrive for the save to succeed; the concurrency shows in its objects."""

    def save(_rank: int) -> None:
        writer = place.child("never-used").writer(concurrency=1)
        for step in (1, 2):
            save_async(
                some_state(), form, storage_writer=writer, checkpoint_id=place.child(f"step-{step}").uri
            )
        dist.barrier()
        for step in (1, 2):
            compare_with_saved(place.child(f"step-{step}"))

    pool(save)
    assert place.child("never-used").visible() == set()
    for step in (1, 2):
        objects = {name for name in place.child(f"step-{step}").visible() if name.endswith(".distcp")}
        assert len(objects) == RANKS  # with concurrency=1 a rank has one object, whatever its size


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.value)
def test_an_error_in_the_background_reaches_the_caller_on_every_rank(
    pool: RankPool, place: Place, form: AsyncCheckpointerType
) -> None:
    def save(_rank: int) -> list[BaseException]:
        dcp.save(some_state(), storage_writer=place.writer())
        with pytest.raises(CheckpointException) as caught:
            save_async(some_state(), form, storage_writer=place.writer())
        return [failure for failure, _ in caught.value.failures.values()]

    for failures in pool(save):
        assert failures
        assert all(isinstance(failure, CheckpointExistsError) for failure in failures)


def test_overwrite_is_kept_through_the_process(pool: RankPool, place: Place) -> None:
    def save(_rank: int) -> None:
        writer = place.writer(overwrite=True)
        for _ in range(2):
            save_async(some_state(), AsyncCheckpointerType.PROCESS, storage_writer=writer)
        dist.barrier()
        compare_with_saved(place)

    pool(save)
    ids = {name.split(".")[1] for name in place.visible() if name.endswith(".distcp")}
    assert len(ids) <= RANKS  # those of the first save are gone


def test_async_save_in_a_single_process_without_a_group(place: Place) -> None:
    state: states.State = {"weight": states.content("weight", (50, 50), torch.float32), "step": 1}
    save_async(state, AsyncCheckpointerType.THREAD, storage_writer=place.writer(), no_dist=True)
    loaded: states.State = {"weight": torch.zeros(50, 50), "step": 0}
    dcp.load(loaded, storage_reader=place.reader())
    states.assert_bit_exact(loaded, state)


@pytest.mark.parametrize("make", [cloudckpt.StorageWriter, cloudckpt.StorageReader])
def test_options_survive_pickling_and_reset(make: Callable[..., Any]) -> None:
    options: dict[str, Any] = {
        "part_size": "7MiB",
        "memory_limit": "100MiB",
        "concurrency": 3,
        "endpoint_url": "http://127.0.0.1:1",
        "region": "eu-central-1",
        "timeout": 5.0,
        "retries": 2,
        "checksum": "crc32c",
        "storage_options": {"key": "k", "secret": "s"},
    }
    made = make("s3://bucket/step-1?retries=9&requester_pays=true", **options)
    before = made._target.options
    again = pickle.loads(pickle.dumps(made))
    again.reset("s3://bucket/step-2")
    after = pickle.loads(pickle.dumps(again))
    assert after.checkpoint_id == "s3://bucket/step-2"
    assert after._target.options == before
    assert before.retries == 2
    assert before.requester_pays is True


def test_metadata_is_returned_as_stock_returns_it(tmp_path: Path) -> None:
    place = Place.in_folder(tmp_path / "run")
    result = dcp.save({"weight": torch.ones(3)}, storage_writer=place.writer())
    assert isinstance(result, dcp_metadata.Metadata)
    assert set(result.state_dict_metadata) == {"weight"}
