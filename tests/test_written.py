"""What the ranks wrote is put into the plan's order and terms, and what is alike is made one object."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from cloudckpt.backends import metadata as md
from cloudckpt.backends import written
from cloudckpt.backends.commit import RankReport


def _planned() -> Metadata:
    chunks = [ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((2, 3))) for row in (0, 2)]
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((4, 3)), chunks)
    return Metadata({"t": tensor, "b": BytesStorageMetadata()})


def _result(index: MetadataIndex, rank: int) -> WriteResult:
    info = _StorageInfo(f"__{rank}_0.distcp", 0, 10)
    info.__dict__["spans"] = tuple([1 << 40, 24])  # noqa: C409 - not the one constant of the module
    return WriteResult(index, 10, info)


def _results() -> list[list[WriteResult]]:
    """As they come from two ranks: nothing is shared, and an index may hold a hint."""
    of_ranks = [
        [_result(MetadataIndex("t", (0, 0), index=0), 0), _result(MetadataIndex("b"), 0)],
        [_result(MetadataIndex("t", (2, 0), index=1), 1)],
    ]
    for rank, results in enumerate(of_ranks):
        results.append(WriteResult(MetadataIndex("a report"), 0, RankReport(rank)))
    return [pickle.loads(pickle.dumps(results)) for results in of_ranks]


def test_items_and_reports_are_told_apart() -> None:
    items, reports = written.gathered(_results())
    assert {place: info.relative_path for place, info in items.items()} == {
        ("t", (0, 0)): "__0_0.distcp",
        ("b", None): "__0_0.distcp",
        ("t", (2, 0)): "__1_0.distcp",
    }
    assert [report.rank for report in reports] == [0, 1]


def test_items_are_in_the_plans_order_and_terms() -> None:
    items, _ = written.gathered(reversed(_results()))
    found = written.shared(_planned(), items)
    assert list(found) == [MetadataIndex("t", (0, 0)), MetadataIndex("t", (2, 0)), MetadataIndex("b")]
    assert [index.index for index in found] == [None] * 3
    assert [info.relative_path for info in found.values()] == ["__0_0.distcp", "__1_0.distcp", "__0_0.distcp"]


def test_what_is_alike_is_made_one() -> None:
    metadata = _planned()
    items, _ = written.gathered(_results())
    found = written.shared(metadata, items)
    tensor = metadata.state_dict_metadata["t"]
    assert isinstance(tensor, TensorStorageMetadata)
    first, second = tensor.chunks
    assert (first.offsets, second.offsets, first.sizes) == ((0, 0), (2, 0), (2, 3))
    assert first.sizes is second.sizes
    for index, chunk in zip(found, tensor.chunks, strict=False):
        assert index.offset is chunk.offsets
    assert len({id(info.__dict__["spans"]) for info in found.values()}) == 1


def test_tensors_cut_alike_share_the_offsets_of_their_shards() -> None:
    metadata = _planned()
    metadata.state_dict_metadata["moment"] = _planned().state_dict_metadata["t"]
    results = _results()
    results[0] += [_result(MetadataIndex("moment", (row, 0)), 0) for row in (0, 2)]
    found = written.shared(metadata, written.gathered(results)[0])
    assert list(found) == list(md.planned(metadata))
    offsets = [index.offset for index in found if index.offset is not None]
    assert offsets == [(0, 0), (2, 0)] * 2
    assert len(set(map(id, offsets))) == 2


def test_an_item_of_the_plan_that_no_rank_wrote_is_named() -> None:
    items, _ = written.gathered(_results()[:1])
    with pytest.raises(written.MissingItemError) as caught:
        written.shared(_planned(), items)
    assert caught.value.index == MetadataIndex("t", (2, 0))
