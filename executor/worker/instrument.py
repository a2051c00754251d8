"""Watching a save through its writer and planner: which phase it is in, how many bytes, which object."""

from __future__ import annotations

from typing import Any, cast

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter

from cloudckpt.backends.save.writer import StorageWriter as OurWriter
from cloudckpt.executor.progress import ProgressBoard


def watched(writer: StorageWriter, planner: SavePlanner, board: ProgressBoard) -> None:
    """Report the work of this writer and planner to the board, from now on.

    Our own writer counts bytes as they are stored. Another library's can only be seen asking for its
    tensors, which counts them as soon as it does.
    """
    write_data, finish = writer.write_data, writer.finish

    def watched_write_data(plan: SavePlan, planner: SavePlanner) -> Any:
        board.phase("writing", sum(map(nbytes_of, plan.items)))
        return write_data(plan, planner)

    def watched_finish(metadata: Metadata, results: Any) -> None:
        board.phase("committing")
        finish(metadata, results)
        board.phase("committed")

    # On the instances, which were unpickled for this one save: a class of anybody's stays what it is.
    _replace(writer, "write_data", watched_write_data)
    _replace(writer, "finish", watched_finish)
    if isinstance(writer, OurWriter):
        writer.observe(board.stored)
        return
    resolve_data = planner.resolve_data

    def watched_resolve_data(write_item: WriteItem) -> Any:
        data = resolve_data(write_item)
        board.stored(write_item.index.fqn, nbytes_of(write_item))
        return data

    _replace(planner, "resolve_data", watched_resolve_data)


def nbytes_of(item: WriteItem) -> int:
    """Bytes of a planned tensor; other values are small, and of unknown size until they are pickled."""
    if item.type is WriteItemType.BYTE_IO or item.tensor_data is None:
        return 0
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _replace(instance: object, name: str, method: object) -> None:
    cast("Any", instance).__dict__[name] = method
