"""DCP's save and load with all ranks in one process: cheap enough to be run thousands of times.

A ``Chunked`` tensor holds any set of boxes of a global tensor, as DTensor and ShardedTensor hold some: DCP's
planners take it for what it is, so that any layout can be saved and loaded without a process group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a global tensor and what this rank holds of it."""

    offsets: tuple[int, ...]
    tensor: Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The box in DCP's terms."""
        return ChunkStorageMetadata(torch.Size(self.offsets), self.tensor.size())


class Chunked(Tensor):
    """A rank's boxes of a global tensor; an implementation of DCP's ``_Checkpointable``."""

    boxes: tuple[Box, ...]

    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, boxes: Sequence[Box]) -> Self:
        """Hold ``boxes`` of a tensor of this shape and type, which need not cover it."""
        make = Tensor._make_wrapper_subclass
        made: Self = make(cls, tuple(shape), dtype=dtype)
        made.boxes = tuple(boxes)
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares another signature than it calls
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} of a Chunked tensor")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # untyped there
        return f"Chunked({tuple(self.shape)}, {self.dtype}, {len(self.boxes)} boxes)"

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(box.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    box.chunk, TensorProperties.create_from_tensor(box.tensor), self.size()
                ),
            )
            for box in self.boxes
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [box.chunk for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        (found,) = (box.tensor for box in self.boxes if torch.Size(box.offsets) == index.offset)
        return found


def save(states: Sequence[State], make_writer: Callable[[], StorageWriter]) -> None:
    """Save as ``dcp.save`` would, the ranks one after another; ``states`` are theirs, in order."""
    writers = [make_writer() for _ in states]
    planners = [DefaultSavePlanner() for _ in states]
    plans = []
    for rank, (state, writer, planner) in enumerate(zip(states, writers, planners, strict=True)):
        planner.set_up_planner(state, writer.storage_meta(), rank == 0)
        writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writers[0].prepare_global_plan(plans)
    results = [
        writer.write_data(planner.finish_plan(plan), planner).wait()
        for writer, planner, plan in zip(writers, planners, plans, strict=True)
    ]
    writers[0].finish(metadata, results)


def load(states: Sequence[State], make_reader: Callable[[], StorageReader]) -> None:
    """Load as ``dcp.load`` would, the ranks one after another."""
    readers = [make_reader() for _ in states]
    planners = [DefaultLoadPlanner() for _ in states]
    plans = []
    for rank, (state, reader, planner) in enumerate(zip(states, readers, planners, strict=True)):
        metadata = reader.read_metadata()
        planner.set_up_planner(state, metadata, rank == 0)
        reader.set_up_storage_reader(metadata, rank == 0, rank=rank, use_collectives=True)
        plans.append(reader.prepare_local_plan(planner.create_local_plan()))
    plans = readers[0].prepare_global_plan(planners[0].create_global_plan(plans))
    for reader, planner, plan in zip(readers, planners, plans, strict=True):
        reader.read_data(planner.finish_plan(plan), planner).wait()
