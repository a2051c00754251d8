"""Copies between host memory and devices, in order with what the caller has queued.

A thread of a pool has the default stream as its current one, which waits for no other. What the caller has
queued must be done before bytes are copied out, and what was copied in must be done before the caller goes
on. Copies run on streams of their own, so that they wait for nothing else that the job has queued, and
fastest from and to memory whose pages are locked.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch


def await_caller(tensor: torch.Tensor) -> None:
    """Wait for what the calling thread has queued on a CUDA tensor's device; call it on that thread."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


def await_copies(devices: set[torch.device]) -> None:
    """Wait for every copy to these devices, whichever thread queued it."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


@contextlib.contextmanager
def side_streams(devices: Iterable[torch.device]) -> Iterator[dict[torch.device, torch.cuda.Stream]]:
    """Enter a stream for each CUDA device, which waits for the caller's; at the end those wait for it."""
    streams: dict[torch.device, torch.cuda.Stream] = {}
    for device in devices:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        streams[device].wait_stream(torch.cuda.current_stream(device))
    try:
        yield streams
    finally:
        for stream in streams.values():
            stream.synchronize()


class _Queued(threading.local):
    """Copies that a thread has queued: its stream for each device, and those that are to be waited for."""

    def __init__(self) -> None:
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.waiting: set[torch.cuda.Stream] = set()


_queued = _Queued()


@contextlib.contextmanager
def beside(tensor: torch.Tensor) -> Iterator[None]:
    """Have the copies of the block, to or from a tensor, run beside all else; `settle` waits for them."""
    if not tensor.is_cuda:
        yield
        return
    stream = _queued.streams.get(tensor.device)
    if stream is None:
        stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        _queued.streams[tensor.device] = stream
    _queued.waiting.add(stream)
    with torch.cuda.stream(stream):
        yield


def settle() -> None:
    """Wait for the copies that this thread has queued `beside` others."""
    while _queued.waiting:
        _queued.waiting.pop().synchronize()


def lock_pages(address: int, nbytes: int) -> bool:
    """Lock pages for copies that need no stop on the way, or tell that they can't be; of no use without CUDA.

    The caller unlocks them before they go: what comes to lie at their address could not be copied to.
    """
    return _succeeded(_cudart().cudaHostRegister(address, nbytes, 0))


def unlock_pages(address: int) -> None:
    """Unlock pages that `lock_pages` has locked from that address on."""
    _succeeded(_cudart().cudaHostUnregister(address))


def _succeeded(answer: Any) -> bool:
    if int(answer) == 0:
        return True
    _forget_error()
    return False


def _forget_error() -> None:
    """Use the device: CUDA reports an error to the next caller on this thread."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _cudart() -> Any:
    """CUDA's runtime, where there is a device."""
    cuda: Any = torch.cuda
    return cuda.cudart()
