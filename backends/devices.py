"""Order between the caller's device stream and the threads that copy for it.

A thread of a pool has the default stream as its current one, which waits for no other. What the caller has
queued must be done before bytes are copied out, and what was copied in must be done before the caller goes
on.
"""

from __future__ import annotations

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
