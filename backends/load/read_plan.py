"""A rank's load plan, turned into extents to read and what to do when they arrive."""

from __future__ import annotations

import functools
import io
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from cloudckpt.backends import strides
from cloudckpt.backends.checksums import Checks, Chunk, Expected, chunk_size
from cloudckpt.backends.errors import (
    CheckpointError,
    ConfigurationError,
    IntegrityError,
    UnsafeCheckpointError,
)
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.format.stock_archive import Stored, locate
from cloudckpt.backends.load.destination import (
    assign,
    copy,
    is_ordinary,
    landing_for,
    memory_for,
    settle_into,
)
from cloudckpt.backends.load.shared_reader import SharedReads
from cloudckpt.backends.state import sparse, stand_ins
from cloudckpt.backends.state.load_planner import CheckpointLoadPlanner
from cloudckpt.backends.state.values import load_tensor, loads, prove_safe
from cloudckpt.backends.torch_private import StorageInfo, narrow_tensor_by_index
from cloudckpt.backends.transfer.byte_ranges import GAP, Extent, Piece, cut, nothing, whole_slices
from cloudckpt.backends.transfer.cuda import await_caller, await_copies, settle
from cloudckpt.backends.transfer.downloader import Downloader, in_reads
from cloudckpt.backends.transfer.gc_pause import no_collection

_WHOLE = 1 << 20
"""Bytes up to which an item of a stock checkpoint is read whole, not asked where its payload lies."""


def load(
    items: Sequence[ReadItem],
    planner: LoadPlanner,
    metadata: Metadata,
    downloader: Downloader,
    shared: SharedReads | None = None,
    *,
    trust: bool,
) -> None:
    """Read what a plan asks for, along with other ranks or alone, and hand it to the planner.

    Raises:
        IntegrityError: an object is missing or short, or an item is not what the metadata says.
        UnsafeCheckpointError: a value can't be loaded without running code.
        ConfigurationError: a destination does not fit, or the checkpoint needs a DCP extension.
    """
    _Load(planner, metadata, downloader, shared, trust=trust).run(items)


class _Load:
    """The extents of one load, gathered item by item."""

    def __init__(
        self,
        planner: LoadPlanner,
        metadata: Metadata,
        downloader: Downloader,
        shared: SharedReads | None,
        *,
        trust: bool,
    ) -> None:
        self._planner = planner
        self._metadata = metadata
        self._downloader = downloader
        self._shared = shared
        self._trust = trust
        self._algorithms = md.algorithms_of(metadata)
        self._chunks: dict[str, dict[torch.Size, torch.Size]] = {}
        self._wanted: defaultdict[str, list[Extent]] = defaultdict(list)
        self._wholes: dict[tuple[str, int, int], _Whole] = {}
        self._devices: set[torch.device] = set()
        self._parts: Counter[MetadataIndex] = Counter()
        self._one_at_a_time = threading.Lock()

    def run(self, items: Sequence[ReadItem]) -> None:
        infos = [self._info(item) for item in items]
        self._parts = Counter(item.dest_index for item in items)
        self._downloader.expect(sum(info.length for info in infos))
        places = self._stored(items, infos)
        with no_collection():
            self._want(items, infos, places)
        # Extents refer back to this object: kept here, they keep the tensors until the collector comes by.
        wanted, self._wanted, self._wholes = self._wanted, defaultdict(list), {}
        with sparse.unlisted():
            if self._shared is None:
                self._downloader.read(wanted)
            else:
                self._shared.read(self._downloader, wanted)
        await_copies(self._devices)

    def _want(
        self, items: Sequence[ReadItem], infos: Sequence[StorageInfo], places: Sequence[Stored | None]
    ) -> None:
        for item, info, stored in zip(items, infos, places, strict=True):
            if item.type is LoadItemType.BYTE_IO:
                self._whole(item, info, functools.partial(self._take_value, item, info))
            elif stored is None:
                self._whole(item, info, functools.partial(self._take_whole_tensor, item, info))
            else:
                self._want_tensor(item, info, stored)
        for whole in self._wholes.values():
            info = whole.info
            extent = Extent(info.offset, info.length, nothing, deliver=functools.partial(_give, whole.takers))
            self._wanted[info.relative_path].append(_checked(extent, self._checks(info), whole.fqn, info))

    def _info(self, item: ReadItem) -> StorageInfo:
        info: StorageInfo | None = self._metadata.storage_data.get(item.storage_index)
        fqn = item.storage_index.fqn
        if info is None:
            raise IntegrityError(
                f"the metadata does not say where {fqn!r} is stored", hint="It is damaged; load another step"
            )
        if info.transform_descriptors:
            raise ConfigurationError(
                f"{fqn!r} was saved through a DCP extension ({', '.join(info.transform_descriptors)})",
                hint="Load this checkpoint with stock DCP and that extension",
            )
        return info

    def _stored(self, items: Sequence[ReadItem], infos: Sequence[StorageInfo]) -> list[Stored | None]:
        """Return the place of each tensor's raw payload; None for values and tensors to be read whole."""
        known: dict[tuple[str, int], Stored | None] = {}
        to_locate: list[StorageInfo] = []
        for item, info in zip(items, infos, strict=True):
            place = (info.relative_path, info.offset)
            if item.type is LoadItemType.BYTE_IO or place in known:
                continue
            known[place] = self._noted(item, info)
            if known[place] is None and info.length > _WHOLE:
                to_locate.append(info)
        for info, stored in zip(to_locate, self._downloader.each(self._locate, to_locate), strict=True):
            known[info.relative_path, info.offset] = stored
        return [known.get((info.relative_path, info.offset)) for info in infos]

    def _noted(self, item: ReadItem, info: StorageInfo) -> Stored | None:
        """Return our own writer's record of an item."""
        payload = md.payload_of(info)
        if payload is None:
            return None
        fqn = item.storage_index.fqn
        entry = self._metadata.state_dict_metadata.get(fqn)
        if not isinstance(entry, TensorStorageMetadata):
            raise IntegrityError(f"the metadata does not describe the tensor {fqn!r}")
        if fqn not in self._chunks:
            self._chunks[fqn] = {chunk.offsets: chunk.sizes for chunk in entry.chunks}
        shape = self._chunks[fqn].get(item.storage_index.offset or torch.Size([0] * len(entry.size)))
        if shape is None or (payload.stride is not None and len(payload.stride) != len(shape)):
            raise IntegrityError(f"the metadata does not describe the chunk of {fqn!r} that it stores")
        stride = payload.stride or strides.row_major(shape)
        return Stored(info.offset + payload.offset, payload.dtype, tuple(shape), stride)

    def _locate(self, info: StorageInfo) -> Stored | None:
        return locate(info.offset, info.length, functools.partial(self._downloader.fetch, info.relative_path))

    def _whole(self, item: ReadItem, info: StorageInfo, take: Callable[[memoryview], None]) -> None:
        place = (info.relative_path, info.offset, info.length)
        self._wholes.setdefault(place, _Whole(item.storage_index.fqn, info)).takers.append(take)

    def _checks(self, info: StorageInfo) -> Checks | None:
        return md.checks_of(info, self._algorithms)

    def _take_value(self, item: ReadItem, info: StorageInfo, data: memoryview) -> None:
        fqn = item.storage_index.fqn
        planner = self._planner
        try:
            if isinstance(planner, CheckpointLoadPlanner):
                take = functools.partial(planner.take_value, item, loads(data, fqn, trust=self._trust))
            else:
                value = io.BytesIO(data) if self._trust else prove_safe(data, fqn)
                take = functools.partial(planner.load_bytes, item, value)
        except CheckpointError as error:
            error.located(object_name=info.relative_path)
            raise
        with self._one_at_a_time:
            take()

    def _take_whole_tensor(self, item: ReadItem, info: StorageInfo, data: memoryview) -> None:
        try:
            tensor = self._loaded(item, data)
        except CheckpointError as error:
            error.located(object_name=info.relative_path)
            raise
        self._check_box(item, info, tuple(tensor.shape))
        with self._one_at_a_time:
            if not is_ordinary(tensor) and self._is_taken(item, tensor):
                return
            target = self._target(item)
            try:
                with torch.no_grad():
                    part = narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
                assign(item, target, part, whole=self._parts[item.dest_index] == 1)
            finally:
                settle()
            self._planner.commit_tensor(item, target)

    def _loaded(self, item: ReadItem, data: memoryview) -> torch.Tensor:
        try:
            return load_tensor(data, item.storage_index.fqn, trust=self._trust)
        except UnsafeCheckpointError:
            with self._one_at_a_time:
                target = self._resolved(item)
            known = self._parts[item.dest_index] == 1 and not is_ordinary(target)
            tensor = stand_ins.load(data, target) if known else None
            if tensor is None:
                raise
            return tensor

    def _is_taken(self, item: ReadItem, tensor: torch.Tensor) -> bool:
        """Offer the planner a tensor that is stored as more than its values; True if it takes it as it is."""
        take: Callable[[ReadItem, torch.Tensor], bool] | None = getattr(self._planner, "take_tensor", None)
        return take is not None and take(item, tensor)

    def _resolved(self, item: ReadItem) -> torch.Tensor:
        with torch.no_grad():  # else the local part of a DTensor is a view, which subclasses make lossily
            return self._planner.resolve_tensor(item)

    def _target(self, item: ReadItem) -> torch.Tensor:
        target = self._resolved(item)
        if is_ordinary(target):  # of others, what is copied into a detached one doesn't come back
            target = target.detach()
        await_caller(target)
        self._devices.add(target.device)
        if target.shape != item.lengths:
            raise ConfigurationError(
                f"the destination of {item.dest_index.fqn!r} has shape {tuple(target.shape)}, "
                f"and {tuple(item.lengths)} is planned for it",
                hint="The load planner and the state disagree",
            )
        return target

    def _check_box(self, item: ReadItem, info: StorageInfo, shape: tuple[int, ...]) -> None:
        fits = len(shape) == len(item.lengths) and all(
            offset >= 0 and offset + length <= whole
            for offset, length, whole in zip(item.storage_offsets, item.lengths, shape, strict=True)
        )
        if not fits:
            raise IntegrityError(
                f"{item.storage_index.fqn!r} is stored with shape {shape}, and the metadata places "
                f"{tuple(item.lengths)} at {tuple(item.storage_offsets)} in it",
                object_name=info.relative_path,
                hint="The checkpoint is damaged; load another step",
            )

    def _want_tensor(self, item: ReadItem, info: StorageInfo, stored: Stored) -> None:
        self._check_box(item, info, stored.shape)
        itemsize = stored.dtype.itemsize
        span = strides.span(stored.shape, stored.stride) * itemsize
        if stored.offset + span > info.offset + info.length:
            raise IntegrityError(
                f"{item.storage_index.fqn!r} does not fit into the {info.length} bytes stored for it",
                object_name=info.relative_path,
                hint="The checkpoint is damaged; load another step",
            )
        target = self._target(item)
        if not is_ordinary(target):
            self._whole(item, info, functools.partial(self._take_whole_tensor, item, info))
            return
        first = sum(at * step for at, step in zip(item.storage_offsets, stored.stride, strict=True))
        start = stored.offset + first * itemsize
        lengths = tuple(item.lengths)
        checks = self._checks(info)
        chunk = chunk_size(span) if checks else 0
        landing = landing_for(target)
        if (memory := memory_for(landing, stored)) is not None:
            todo = [
                functools.partial(_extent_into, stored.offset + at, piece)
                for at, piece in in_reads(start - stored.offset, memory, self._downloader.largest, chunk or 1)
            ]
        else:
            # What lies in a chunk is read as a whole to verify it, holes and all.
            most = self._downloader.largest if self._shared is None else self._shared.largest_piece
            gap = max(GAP, chunk) // itemsize
            pieces = cut(lengths, stored.stride, first, max(1, most // itemsize), gap)
            todo = [functools.partial(self._piece_extent, item, piece, landing, stored) for piece in pieces]
        done = _Countdown(len(todo), functools.partial(self._commit, item, target, landing))
        fqn = item.storage_index.fqn
        self._wanted[info.relative_path].extend(_checked(make(done.step), checks, fqn, info) for make in todo)
        if not todo:
            self._commit(item, target, landing)

    def _piece_extent(
        self,
        item: ReadItem,
        piece: Piece,
        target: torch.Tensor,
        stored: Stored,
        done: Callable[[], None],
    ) -> Extent:
        for dim, (at, length) in enumerate(zip(piece.starts, piece.lengths, strict=True)):
            target = target.narrow(dim, at, length)
        itemsize = stored.dtype.itemsize
        offset, size = stored.offset + piece.first * itemsize, piece.span * itemsize
        if (memory := memory_for(target, stored)) is not None:
            return Extent(offset, size, done, into=memory)

        def deliver(data: memoryview) -> None:
            flat = torch.frombuffer(data, dtype=torch.uint8).view(stored.dtype)
            copy(item, target, flat.as_strided(piece.lengths, stored.stride))

        lead = trail = 0
        if self._shared is not None:
            end = strides.span(stored.shape, stored.stride)
            lead, trail = whole_slices(piece, stored.stride, piece.first, end)
        return Extent(
            offset,
            size,
            done,
            deliver=deliver,
            lead=lead * itemsize,
            trail=trail * itemsize,
            to_device=target.is_cuda,
        )

    def _commit(self, item: ReadItem, target: torch.Tensor, landing: torch.Tensor) -> None:
        with self._one_at_a_time:
            if landing is not target:
                settle_into(item, target, landing)
            self._planner.commit_tensor(item, target)


class _Countdown:
    """Calls ``then`` when ``step`` has been called ``count`` times, on any threads."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._left = count
        self._then = then
        self._lock = threading.Lock()

    def step(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._then()


@dataclass(slots=True)
class _Whole:
    """An item that is read whole, and who takes it."""

    fqn: str
    info: StorageInfo
    takers: list[Callable[[memoryview], None]] = field(default_factory=list)


def _checked(extent: Extent, checks: Checks | None, fqn: str, info: StorageInfo) -> Extent:
    """Return the extent, widened to whole chunks of its item, and with a check of them."""
    if checks is None:
        return extent
    start, stop = extent.begin - info.offset, extent.end - info.offset
    chunks = checks.chunks(*checks.with_framing(start, stop))
    if not chunks:
        return extent
    return Extent(  # dataclasses.replace costs more than all else here
        extent.start,
        extent.size,
        extent.done,
        extent.into,
        extent.deliver,
        lead=extent.lead + start - chunks[0].start,
        trail=extent.trail + chunks[-1].stop - stop,
        to_device=extent.to_device,
        expected=Expected(checks, chunks, functools.partial(_refuse, fqn, info)),
    )


def _refuse(fqn: str, info: StorageInfo, damaged: Sequence[Chunk]) -> None:
    for chunk in damaged:
        raise IntegrityError(
            f"{fqn!r} is damaged: bytes {info.offset + chunk.start} to {info.offset + chunk.stop} of the "
            "object are not those that were saved",
            object_name=info.relative_path,
            hint="Load another step; verify lists all that is damaged in this one",
        )


def _extent_into(offset: int, memory: memoryview, done: Callable[[], None]) -> Extent:
    return Extent(offset, memory.nbytes, done, into=memory)


def _give(takers: Sequence[Callable[[memoryview], None]], data: memoryview) -> None:
    for take in takers:
        take(data)
