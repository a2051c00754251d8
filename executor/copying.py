"""Copying a snapshot's sources into its arena, from host memory or from a device."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cloudckpt.executor.arena import Arena
from cloudckpt.executor.layout import Layout, Source

_SMALL = 1 << 20
"""Bytes below which one ``memmove`` is cheaper than torch's copy on several threads."""


def copy(layout: Layout, arena: Arena) -> None:
    """Copy every source to its place; when this returns, all of it has arrived.

    Copies from a CUDA device go to pinned pages on a stream of their own, behind what the caller has queued.
    """
    devices = {device for source in layout.sources if (device := source.memory.device).type == "cuda"}
    if devices:
        arena.pin()
    address = arena.address
    with _side_streams(devices) as streams:
        for source, offset in zip(layout.sources, layout.offsets, strict=True):
            if source.memory.device.type == "cpu":
                _copy_on_host(source, arena, address, offset)
                continue
            with torch.cuda.stream(streams.get(source.memory.device)):
                _as_bytes(source, arena, offset, non_blocking=source.memory.device in streams)


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


@contextmanager
def _side_streams(devices: set[torch.device]) -> Iterator[dict[torch.device, torch.cuda.Stream]]:
    """A stream for each CUDA device, which waits for the caller's and is waited for at the end."""
    streams: dict[torch.device, torch.cuda.Stream] = {}
    for device in devices:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        streams[device].wait_stream(torch.cuda.current_stream(device))
    try:
        yield streams
    finally:
        for stream in streams.values():
            stream.synchronize()
