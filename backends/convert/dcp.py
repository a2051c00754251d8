"""A checkpoint as what is converted, and as what is made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ByteSize
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.convert.state_source import Entry, Source
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.format.committed import committed
from cloudckpt.backends.format.tensor_archive import encode_fetched
from cloudckpt.backends.save.uploader import Observer
from cloudckpt.backends.save.writer import StorageWriter
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.transfer.downloader import Downloader


def open_checkpoint(store: ObjectStore, target: Target, memory_limit: int, *, trust: bool) -> Source:
    """Return a committed checkpoint as a source of tensors and values.

    Raises:
        CheckpointNotFoundError: nothing is committed there.
        UnsafeCheckpointError: reading its metadata would run code.
        IntegrityError: its metadata is damaged.
    """
    data = committed(
        store,
        md.METADATA_NAME,
        "there is no committed checkpoint here, and no file to convert",
        "Check the URI; a file's ends in .pt, .pth, .bin, .ckpt or .safetensors",
    )
    metadata = md.load(data, uri=store.uri, trust=trust)
    concurrency = max(1, target.options.concurrency // 2)  # of each part that is being sent
    downloader = Downloader(store, concurrency, memory_limit, md.least_sizes(metadata))
    paths: Any = metadata.planner_data
    return Source(store, metadata, downloader, paths=paths if isinstance(paths, dict) else None, trust=trust)


def stand_ins(entries: Mapping[str, Entry]) -> dict[str, torch.Tensor]:
    """Tensors like these, with no memory, that a save can be planned of."""
    return {
        key: torch.empty_strided(entry.shape, entry.stride, dtype=entry.dtype, device="meta")
        for key, entry in entries.items()
    }


def write_checkpoint(
    target: Target,
    state: dict[str, Any],
    fetched: Mapping[int, Entry],
    source: Source,
    *,
    memory_limit: int,
    overwrite: bool,
    observer: Observer,
) -> None:
    """Save a state as one rank does, its tensors fetched as they are sent.

    Args:
        target: where to.
        state: with stand-ins.
        fetched: what each of them stands for, by its ``id``.
        source: where that is.
        memory_limit: bytes held at most.
        overwrite: replace what is committed there.
        observer: called for every part that is stored.

    Raises:
        CheckpointExistsError: one is committed there.
        CommitError: the commit failed.
    """
    options = target.options.model_copy(update={"memory_limit": ByteSize(memory_limit)})
    writer = StorageWriter(dataclasses.replace(target, options=options), overwrite=overwrite)
    writer.observe(observer)
    planner = _Planner(fetched, source)
    writer.reset()
    writer.set_up_storage_writer(is_coordinator=True)
    try:
        planner.set_up_planner(state, writer.storage_meta(), is_coordinator=True)
        plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
        (plan,) = writer.prepare_global_plan(plans)
        results = writer.write_data(planner.finish_plan(plan), planner).wait()
        source.ensure_unchanged()
    except BaseException:
        writer.abort()
        raise
    writer.finish(metadata, [results])


class _Planner(DefaultSavePlanner):
    """DCP's own, which lays out what a stand-in stands for."""

    def __init__(self, fetched: Mapping[int, Entry], source: Source) -> None:
        super().__init__()
        self._fetched = fetched
        self._source = source

    def resolve_data(self, write_item: WriteItem) -> Any:
        entry = self._fetched.get(id(self.lookup_object(write_item.index)))
        if entry is None:
            return super().resolve_data(write_item)
        return encode_fetched(self._source.segment(entry), entry.dtype, entry.shape, entry.stride)
