"""Collectives of bytes in a group of torch.distributed.

torch's collectives of objects, `gather_object` and the like, unpickle what another rank sends: they run what
it likes. These send the same messages, and return bytes, which their callers read as data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from cloudckpt.backends.torch_private import object_device


def all_gather(data: bytes, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """Return the data of every rank of a group, in order of their ranks."""
    sizes = _sizes(data, group)
    mine = _padded(data, max(sizes), group)
    every = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(every, mine, group=group)
    return _cut(every, sizes)


def gather(data: bytes, group: dist.ProcessGroup | None = None) -> list[bytes] | None:
    """Return the data of every rank on the group's first rank, and None on the others."""
    sizes = _sizes(data, group)
    mine = _padded(data, max(sizes), group)
    every = [torch.empty_like(mine) for _ in sizes] if dist.get_rank(group) == 0 else None
    dist.gather(mine, every, group=group, group_dst=0)
    return None if every is None else _cut(every, sizes)


def broadcast(data: bytes | None, group: dist.ProcessGroup | None = None) -> bytes:
    """Return the data of the group's first rank; what other ranks give is not looked at."""
    is_first = dist.get_rank(group) == 0
    given = data or b"" if is_first else b""
    size = torch.tensor([len(given)], dtype=torch.long, device=object_device(group))
    dist.broadcast(size, group=group, group_src=0)
    count = int(size.item())
    box = _padded(given, count, group)
    dist.broadcast(box, group=group, group_src=0)
    return given if is_first else _cut([box], [count])[0]


def scatter(every: Sequence[bytes] | None, group: dist.ProcessGroup | None = None) -> bytes:
    """Return what the group's first rank has for this rank.

    Args:
        every: data for each rank, on the first rank; None on the others.
        group: the ranks.
    """
    count, device = dist.get_world_size(group), object_device(group)
    sizes = torch.tensor(
        [len(data) for data in every] if every is not None else [0] * count, dtype=torch.long, device=device
    )
    dist.broadcast(sizes, group=group, group_src=0)
    most = int(sizes.max().item())
    box = _padded(b"", most, group)
    boxes = None if every is None else [_padded(data, most, group) for data in every]
    dist.scatter(box, boxes, group=group, group_src=0)
    return _cut([box], [int(sizes[dist.get_rank(group)].item())])[0]


def _sizes(data: bytes, group: dist.ProcessGroup | None) -> list[int]:
    own = torch.tensor([len(data)], dtype=torch.long, device=object_device(group))
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    return [int(size.item()) for size in every]


def _padded(data: bytes, size: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return a tensor of so many bytes that begins with the data. A collective takes tensors of one size."""
    padded = bytearray(max(size, 1))
    padded[: len(data)] = data
    return torch.frombuffer(padded, dtype=torch.uint8).to(object_device(group))


def _cut(tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[bytes]:
    found: list[bytes] = []
    for tensor, size in zip(tensors, sizes, strict=True):
        memory = bytearray(tensor.nbytes)
        torch.frombuffer(memory, dtype=torch.uint8).copy_(tensor)
        found.append(bytes(memory[:size]))
    return found
