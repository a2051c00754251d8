"""The pickler of metadata makes what `pickle.dumps` makes, byte by byte."""

from __future__ import annotations

import copyreg
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.format import metadata_pickler
from cloudckpt.backends.format.tensor_archive import Payload


class _Own:
    """What a planner of the user's may put into its data."""


def _metadata(planner_data: Any = None) -> Metadata:
    shared, chunk = torch.Size((4, 0)), torch.Size((2, 3))
    return Metadata(
        {
            "t": TensorStorageMetadata(
                TensorProperties(torch.float32),
                torch.Size((6, 3)),
                [ChunkStorageMetadata(torch.Size((0, 0)), chunk), ChunkStorageMetadata(shared, chunk)],
            ),
            "scalar": TensorStorageMetadata(
                TensorProperties(torch.int8),
                torch.Size(()),
                [ChunkStorageMetadata(torch.Size(()), torch.Size(()))],
            ),
            "b": BytesStorageMetadata(),
        },
        planner_data=planner_data,
        storage_data={
            MetadataIndex("t", (0, 0)): md.storage_info(
                "__0_0.distcp", 0, 900, Payload(700, torch.float32, (1, 4))
            ),
            MetadataIndex("t", shared, index=1): md.storage_info("__1_0.distcp", 0, 1 << 40, None),
            MetadataIndex("scalar", ()): _StorageInfo(
                "__0_0.distcp", 900, 10, transform_descriptors=["zstd"]
            ),
            MetadataIndex("b"): _StorageInfo("__0_0.distcp", 910, 7),
        },
        storage_meta=StorageMeta(checkpoint_id=Path("x"), save_id="1"),
    )


@pytest.mark.parametrize("again", [False, True], ids=["made here", "come from a rank"])
def test_the_bytes_are_those_of_pickle(*, again: bool) -> None:
    metadata = _metadata()
    if again:  # what is None is absent then, and keys are in another order
        metadata = pickle.loads(pickle.dumps(metadata))
    assert metadata_pickler.dumps(metadata) == pickle.dumps(metadata)


def test_what_was_registered_with_copyreg_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(copyreg.dispatch_table, _Own, lambda _: (str, ("taken apart",)))
    made = metadata_pickler.dumps(_metadata(planner_data=_Own()))
    assert pickle.loads(made).planner_data == "taken apart"


def test_a_subclass_is_taken_apart_as_it_says() -> None:
    metadata = _metadata(planner_data=_Index("x"))
    assert metadata_pickler.dumps(metadata) == pickle.dumps(metadata)
    assert pickle.loads(metadata_pickler.dumps(metadata)).planner_data == "an index"


class _Index(MetadataIndex):
    def __reduce__(self) -> tuple[Any, ...]:
        return str, ("an index",)
