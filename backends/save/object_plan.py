"""A rank's save plan, turned into objects to send, and into write results once they are sent."""

from __future__ import annotations

import io
import itertools
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from cloudckpt.backends.checksums import Algorithm, Checks, Fragment, joined
from cloudckpt.backends.config.options import Options
from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.format.tensor_archive import Item, encode_bytes, encode_tensor
from cloudckpt.backends.save import object_layout
from cloudckpt.backends.state import tensors
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.torch_private import AsyncCollectiveTensor, StorageInfo
from cloudckpt.backends.transfer.adaptive_concurrency import transfer_lanes
from cloudckpt.backends.transfer.cuda import await_caller
from cloudckpt.backends.transfer.request_limit import transfers
from cloudckpt.backends.transfer.segments import Segment, part_size_of


@dataclass(frozen=True, slots=True)
class _Laid:
    """An item in its object."""

    index: MetadataIndex
    info: StorageInfo
    spans: tuple[int, ...]
    """Bytes of each of its segments."""


@dataclass(slots=True)
class PlannedObject:
    """An object of this save; its items are made as its segments are taken."""

    name: str
    part_size: int
    """Bytes."""
    part_size_in_place: int
    """Bytes, where parts need no memory."""
    _items: Sequence[WriteItem]
    _planner: SavePlanner
    _laid: list[_Laid] = field(default_factory=list)

    def to_send(self) -> tuple[Iterable[Segment], int]:
        """Return the bytes of all items, end to end, and the size of parts to send them in.

        Raises:
            ConfigurationError: one of the first items can't be saved; taking segments raises it for others.
        """
        return part_size_of(self.segments(), self.part_size, self.part_size_in_place)

    def segments(self) -> Iterator[Segment]:
        """Yield the bytes of all items, end to end.

        Raises:
            ConfigurationError: an item can't be saved.
        """
        offset = 0
        for item in self._items:
            encoded = _encoded(item, self._planner)
            info = md.storage_info(self.name, offset, encoded.nbytes, encoded.payload)
            spans = tuple(segment.nbytes for segment in encoded.segments)
            self._laid.append(_Laid(item.index, info, spans))
            offset += encoded.nbytes
            yield from encoded.segments

    def results(self, algorithm: Algorithm, fragments: Sequence[Fragment]) -> Iterator[WriteResult]:
        """Yield DCP's results for the items, with their checksums, once all bytes are sent."""
        sums = joined(algorithm, (span for laid in self._laid for span in laid.spans), fragments)
        for laid in self._laid:
            own = b"".join(itertools.islice(sums, len(laid.spans)))
            md.add_checks(laid.info, Checks(algorithm, laid.spans, own))
            yield WriteResult(laid.index, laid.info.length, laid.info)


def laid_out(
    items: Sequence[WriteItem], planner: SavePlanner, rank: int, options: Options, store: ObjectStore
) -> list[PlannedObject]:
    """Spread a plan's items over objects, whose names nothing ever had before.

    The id is drawn for this call: a plan that DCP's planner has cached, or a second try, never meets an old
    name.
    """
    call = uuid.uuid4().hex
    # Every object costs requests to begin and to complete.
    most = options.concurrency if store.wants_several_objects else 1
    buckets = object_layout.distribute(items, object_layout.usual_part_size(options), most)
    sizes = [sum(map(object_layout.estimated_size, bucket)) for bucket in buckets]
    limits, at_once = store.part_limits, transfer_lanes(store, "up", transfers(store, options)).limit
    in_place = object_layout.part_size_in_place(sum(sizes), at_once, options, limits)
    usual = object_layout.usual_part_size(options)
    return [
        PlannedObject(
            f"{md.DATA_PREFIX}{rank}_{index}.{call}{md.DATA_SUFFIX}",
            needed := object_layout.part_size_for(size, options, limits),
            in_place if needed == usual else max(needed, in_place),
            bucket,
            planner,
        )
        for index, (bucket, size) in enumerate(zip(buckets, sizes, strict=True))
    ]


def _encoded(item: WriteItem, planner: SavePlanner) -> Item:
    if item.type is not WriteItemType.BYTE_IO:
        with torch.no_grad():  # else the local part of a DTensor is a view, which subclasses make lossily
            resolved = planner.resolve_data(item)
        if isinstance(resolved, Item):  # by a planner of this library's own
            return resolved
        tensor = cast(torch.Tensor, resolved)
        if isinstance(tensor, AsyncCollectiveTensor):
            tensor = tensor.wait()
        if refused := tensors.unstorable(tensor):
            raise ConfigurationError(f"the tensor {item.index.fqn!r} {refused.reason}", hint=refused.hint)
        encoded, planned = encode_tensor(tensor), item.tensor_data
        await_caller(tensor)  # for what encoding has queued as well: a conjugate's elements, say
        if planned is None or tensor.shape != planned.chunk.sizes:
            # A planner may reshape a tensor after planning; the archive alone then says what it is.
            encoded = replace(encoded, payload=None)
        return encoded
    try:
        return encode_bytes(cast(io.BytesIO, planner.resolve_data(item)))
    except Exception as error:
        raise ConfigurationError(
            f"the value at {item.index.fqn!r} cannot be saved: {type(error).__name__}: {error}",
            hint="A state holds tensors and values that pickle; leave this out or make plain data of it",
        ) from error
