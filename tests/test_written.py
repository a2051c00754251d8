"""What the ranks wrote is put into the plan's terms, and what is alike is made one object."""

from __future__ import annotations

import copy
import dataclasses
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

from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.save import write_results
from cloudckpt.backends.save.commit import RankReport


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


def test_every_report_is_found_wherever_it_stands() -> None:
    results = _results()
    assert [report.rank for report in write_results.reports_in(results)] == [0, 1]
    results[0].insert(0, results[0].pop())  # a writer around ours may have put its own results behind
    assert [report.rank for report in write_results.reports_in(results)] == [0, 1]
    assert [report.rank for report in write_results.reports_in([[*results[0], *results[1]]])] == [0, 1]
    assert write_results.reports_in([[], results[1][:1]]) == []


def test_items_are_in_the_order_of_the_results() -> None:
    found = write_results.shared(_planned(), list(reversed(_results())))
    assert list(found) == [MetadataIndex("t", (2, 0)), MetadataIndex("t", (0, 0)), MetadataIndex("b")]
    assert [info.relative_path for info in found.values()] == ["__1_0.distcp", "__0_0.distcp", "__0_0.distcp"]


def test_what_was_not_planned_is_left_out() -> None:
    results = _results()
    results[0] += [_result(MetadataIndex("t", (1, 0)), 0), _result(MetadataIndex("another"), 0)]
    results[1] += [_result(MetadataIndex("t"), 1), WriteResult(MetadataIndex("b"), 0, "what is this?")]
    assert set(write_results.shared(_planned(), results)) == set(md.planned(_planned()))


def test_of_an_item_written_twice_the_last_counts() -> None:
    results = _results()
    results[1].append(_result(MetadataIndex("b"), 1))
    assert write_results.shared(_planned(), results)[MetadataIndex("b")].relative_path == "__1_0.distcp"


def test_what_is_alike_is_made_one() -> None:
    metadata = _planned()
    found = write_results.shared(metadata, _results())
    tensor = metadata.state_dict_metadata["t"]
    assert isinstance(tensor, TensorStorageMetadata)
    first, second = tensor.chunks
    assert (first.offsets, second.offsets, first.sizes) == ((0, 0), (2, 0), (2, 3))
    assert first.sizes is second.sizes
    (name,) = (fqn for fqn in metadata.state_dict_metadata if fqn == "t")
    for index, chunk in zip((index for index in found if index.fqn == "t"), tensor.chunks, strict=True):
        assert index.fqn is name
        assert index.offset is chunk.offsets
    assert len({id(info.__dict__["spans"]) for info in found.values()}) == 1


def test_tensors_cut_alike_share_their_chunks() -> None:
    metadata = _planned()
    metadata.state_dict_metadata["moment"] = _planned().state_dict_metadata["t"]
    results = _results()
    results[0] += [_result(MetadataIndex("moment", (row, 0)), 0) for row in (0, 2)]
    found = write_results.shared(metadata, results)
    assert set(found) == set(md.planned(metadata))
    offsets = [index.offset for index in found if index.offset is not None]
    assert sorted(offsets) == sorted([(0, 0), (2, 0)] * 2)
    assert len(set(map(id, offsets))) == 2
    one, other = (metadata.state_dict_metadata[fqn] for fqn in ("t", "moment"))
    assert isinstance(one, TensorStorageMetadata)
    assert isinstance(other, TensorStorageMetadata)
    assert one.chunks is not other.chunks
    assert [*map(id, one.chunks)] == [*map(id, other.chunks)]


def test_tensors_cut_otherwise_keep_their_own_chunks() -> None:
    metadata = _planned()
    chunks = [ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((2, 4))) for row in (0, 2)]
    wide = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((4, 4)), chunks)
    short = dataclasses.replace(wide, size=torch.Size((2, 4)), chunks=chunks[1:])
    metadata.state_dict_metadata.update(wide=wide, short=short)
    before = copy.deepcopy(metadata.state_dict_metadata)
    results = _results()
    results[1] += [_result(MetadataIndex("wide", (row, 0)), 1) for row in (0, 2)]
    results[1] += [_result(MetadataIndex("short", (row, 0)), 1) for row in (0, 2)]
    found = write_results.shared(metadata, results)
    assert metadata.state_dict_metadata == before
    assert MetadataIndex("short", (0, 0)) not in found
    assert set(found) == set(md.planned(metadata))


def test_a_planner_may_give_chunks_as_lists() -> None:
    metadata = _planned()
    tensor = metadata.state_dict_metadata["t"]
    assert isinstance(tensor, TensorStorageMetadata)
    tensor.chunks[1] = ChunkStorageMetadata([2, 0], (2, 3))  # type: ignore[arg-type]
    assert set(write_results.shared(metadata, _results())) == set(md.planned(_planned()))
    assert metadata.state_dict_metadata == _planned().state_dict_metadata
    assert all(type(chunk.offsets) is type(chunk.sizes) is torch.Size for chunk in tensor.chunks)


def test_an_item_of_the_plan_that_no_rank_wrote_is_named() -> None:
    with pytest.raises(write_results.MissingItemError) as caught:
        write_results.shared(_planned(), _results()[:1])
    assert caught.value.index == MetadataIndex("t", (2, 0))
