"""Faults found by trying to break the library, each with the input that showed it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

import cloudckpt
from cloudckpt.backends.format import metadata as md


class _ToInt32(DefaultSavePlanner):
    """Transforms after planning, so that the plan says float32 and int32 is stored."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002 - DCP's name
        transformed = super().transform_object(write_item, object)
        return transformed.to(torch.int32) if isinstance(transformed, torch.Tensor) else transformed


class NamedTensor(torch.Tensor):
    """A subclass that ``weights_only`` refuses."""


def _failure(raised: pytest.ExceptionInfo[CheckpointException]) -> BaseException:
    return raised.value.failures[0][0]


def _alter(folder: Path, change: Callable[[Metadata], object]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def _info(metadata: Metadata, fqn: str) -> dict[str, Any]:
    info: dict[str, Any] = metadata.storage_data[MetadataIndex(fqn)].__dict__
    return info


def test_a_tensor_that_the_planner_converts_after_planning_is_read_as_what_is_stored(tmp_path: Path) -> None:
    tensor = torch.arange(6, dtype=torch.float32)
    dcp.save({"x": tensor}, storage_writer=cloudckpt.StorageWriter(tmp_path / "c"), planner=_ToInt32())

    state = {"x": torch.zeros(6)}
    dcp.load(state, storage_reader=cloudckpt.StorageReader(tmp_path / "c"))

    assert torch.equal(state["x"], tensor)


def test_a_sparse_tensor_arrives_in_the_state(tmp_path: Path) -> None:
    tensor = torch.eye(4).to_sparse()
    dcp.save({"x": tensor}, storage_writer=cloudckpt.StorageWriter(tmp_path / "c"))

    state = {"x": torch.zeros(4, 4).to_sparse()}
    dcp.load(state, storage_reader=cloudckpt.StorageReader(tmp_path / "c"))

    assert torch.equal(state["x"].to_dense(), torch.eye(4))


@pytest.mark.parametrize(
    "destination",
    [torch.zeros(3, 4).to_sparse(), torch.zeros(1, 1).expand(3, 4)],
    ids=["sparse", "overlapping"],
)
def test_a_destination_that_cannot_be_filled_is_a_configuration_error(
    tmp_path: Path, destination: torch.Tensor
) -> None:
    dcp.save({"x": torch.rand(3, 4)}, storage_writer=cloudckpt.StorageWriter(tmp_path / "c"))

    with pytest.raises(CheckpointException) as raised:
        dcp.load({"x": destination}, storage_reader=cloudckpt.StorageReader(tmp_path / "c"))

    assert isinstance(_failure(raised), cloudckpt.ConfigurationError)


def test_a_tensor_on_the_meta_device_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException) as raised:
        dcp.save({"x": torch.empty(3, device="meta")}, storage_writer=cloudckpt.StorageWriter(tmp_path / "c"))

    assert isinstance(_failure(raised), cloudckpt.ConfigurationError)
    assert list(tmp_path.iterdir()) == []


def test_trust_lets_a_tensor_subclass_load(tmp_path: Path) -> None:
    tensor = torch.ones(3).as_subclass(NamedTensor)
    dcp.save({"x": tensor}, storage_writer=cloudckpt.StorageWriter(tmp_path / "c"))

    with pytest.raises(CheckpointException) as raised:
        dcp.load({"x": torch.zeros(3)}, storage_reader=cloudckpt.StorageReader(tmp_path / "c"))
    state = {"x": torch.zeros(3)}
    dcp.load(state, storage_reader=cloudckpt.StorageReader(tmp_path / "c", trust=True))

    assert isinstance(_failure(raised), cloudckpt.UnsafeCheckpointError)
    assert state["x"].sum() == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: metadata.__dict__.pop("state_dict_metadata"),
        lambda metadata: _info(metadata, "n").pop("length"),
        lambda metadata: _info(metadata, "n").update(length="x"),
        lambda metadata: _info(metadata, "n").update(length=1 << 40),
        lambda metadata: _info(metadata, "n").update(length=1 << 70),
        lambda metadata: _info(metadata, "n").update(transform_descriptors=7),
        lambda metadata: metadata.state_dict_metadata["x"].properties.__dict__.update(dtype=3),
    ],
    ids=["no entries", "no length", "text length", "huge length", "huger length", "descriptors", "dtype"],
)
def test_metadata_of_another_shape_is_an_integrity_error(
    tmp_path: Path, change: Callable[[Metadata], object]
) -> None:
    dcp.save({"x": torch.ones(3), "n": 1}, storage_writer=cloudckpt.StorageWriter(tmp_path))
    _alter(tmp_path, change)

    with pytest.raises(CheckpointException) as raised:
        dcp.load({"x": torch.ones(3), "n": 1}, storage_reader=cloudckpt.StorageReader(tmp_path))

    assert isinstance(_failure(raised), cloudckpt.IntegrityError)


@pytest.mark.parametrize("named", [".metadata", "sub/__0_0.distcp", "notes.txt"])
def test_overwriting_deletes_data_objects_only_whatever_the_old_metadata_names(
    tmp_path: Path, named: str
) -> None:
    bystander = tmp_path / named
    bystander.parent.mkdir(exist_ok=True)
    dcp.save({"x": torch.ones(3)}, storage_writer=cloudckpt.StorageWriter(tmp_path))
    if named != md.METADATA_NAME:
        bystander.write_bytes(b"mine")
    _alter(
        tmp_path,
        lambda metadata: [i.__dict__.update(relative_path=named) for i in metadata.storage_data.values()],
    )

    dcp.save({"x": torch.ones(3)}, storage_writer=cloudckpt.StorageWriter(tmp_path, overwrite=True))

    assert bystander.exists()
    dcp.load({"x": torch.ones(3)}, storage_reader=cloudckpt.StorageReader(tmp_path))


def test_metadata_that_a_load_has_used_can_be_copied_and_pickled(tmp_path: Path) -> None:
    dcp.save({"x": torch.ones(3)}, storage_writer=cloudckpt.StorageWriter(tmp_path))
    reader = cloudckpt.StorageReader(tmp_path)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)

    copies: list[Any] = [copy.deepcopy(metadata), pickle.loads(pickle.dumps(metadata))]
    for copied in copies:
        assert type(copied.state_dict_metadata["x"].size) is torch.Size
