"""Copying a snapshot's sources into its arena, from host memory or from a device."""

from __future__ import annotations

import ctypes

import torch

from cloudckpt.backends.transfer.cuda import side_streams
from cloudckpt.executor.snapshot.arena import Arena
from cloudckpt.executor.snapshot.memory_layout import Layout, Source

_SMALL = 1 << 20
"""Bytes below which one ``memmove`` is cheaper than torch's copy on several threads."""


def copy(layout: Layout, arena: Arena) -> None:
    """Copy every source to its place; when this returns, all of it has arrived.

    Copies from a CUDA device go to pinned pages on a stream of their own, behind what the caller has queued.
    """
    devices = layout.devices
    if devices:
        arena.pin()
    address = arena.address
    with side_streams(devices) as streams:
        for device, stream in streams.items():
            with torch.cuda.stream(stream):
                for source, offset in zip(layout.sources, layout.offsets, strict=True):
                    if source.memory.device == device:
                        _as_bytes(source, arena, offset, non_blocking=True)
        for source, offset in zip(layout.sources, layout.offsets, strict=True):
            if source.memory.device.type == "cpu":
                _copy_on_host(source, arena, address, offset)
            elif source.memory.device not in streams:
                _as_bytes(source, arena, offset, non_blocking=False)


def _copy_on_host(source: Source, arena: Arena, address: int, offset: int) -> None:
    memory = source.memory
    if isinstance(memory, torch.UntypedStorage) and source.nbytes < _SMALL:
        ctypes.memmove(address + offset, memory.data_ptr() + source.start, source.nbytes)
    else:
        _as_bytes(source, arena, offset, non_blocking=False)


def _as_bytes(source: Source, arena: Arena, offset: int, *, non_blocking: bool) -> None:
    memory, target = source.memory, arena.bytes_at(offset, source.nbytes)
    if isinstance(memory, torch.Tensor):
        target.view(memory.dtype).view(memory.shape).copy_(memory, non_blocking=non_blocking)
        return
    stretch = torch.empty(0, dtype=torch.uint8, device=memory.device)
    stretch.set_(memory, source.start, (source.nbytes,), (1,))
    target.copy_(stretch, non_blocking=non_blocking)
