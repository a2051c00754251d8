"""A tensor of the state that a stored one is loaded into."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.planner import ReadItem

from cloudckpt.backends import strides
from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.format.stock_archive import Stored
from cloudckpt.backends.state import subclasses
from cloudckpt.backends.torch_private import is_zerotensor
from cloudckpt.backends.transfer.cuda import beside, settle
from cloudckpt.backends.transfer.segments import bytes_of


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Return True for a tensor that is nothing but its elements, in memory of its own class."""
    return subclasses.is_plain(tensor) and tensor.layout is torch.strided and not tensor.is_quantized


def memory_for(target: torch.Tensor, stored: Stored) -> memoryview | None:
    """Return the destination's own memory; None where stored bytes can't go straight into it."""
    shape = tuple(target.shape)
    straight = (
        type(target) is torch.Tensor
        and target.device.type == "cpu"
        and target.layout is torch.strided
        and target.dtype == stored.dtype
        and not target.is_conj()
        and not target.is_neg()
        and not target.is_quantized
        and strides.is_dense(shape, stored.stride)
        and strides.same_order(shape, target.stride(), stored.stride)
    )
    if not straight or target.numel() == 0:
        return None
    return bytes_of(target.as_strided((target.numel(),), (1,)))


def landing_for(target: torch.Tensor) -> torch.Tensor:
    """Return memory to read into: the destination itself, unless its elements can't be written one by one.

    Those of an expanded tensor share memory, and a zero tensor has none. `settle_into` brings over what has
    been read.
    """
    if is_zerotensor(target) or strides.repeats(target.shape, target.stride()):
        return torch.empty(target.shape, dtype=target.dtype, device=target.device)
    return target


def settle_into(item: ReadItem, target: torch.Tensor, landing: torch.Tensor) -> None:
    """Bring what has been read into the destination, which must be able to hold it.

    Raises:
        ConfigurationError: elements that share memory were not saved alike.
    """
    settle()
    if not is_zerotensor(target):
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in target.stride())
        copy(item, target[once], landing[once])
        settle()
    there = target.cpu().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    if bytes_of(there) != bytes_of(landing.cpu()):
        raise uncopied(item, ValueError("its elements share memory, and those that were saved differ"))


def assign(item: ReadItem, target: torch.Tensor, source: torch.Tensor, *, whole: bool) -> None:
    """Make the destination equal a tensor that was loaded whole; ``whole`` says that all of it is covered.

    Raises:
        ConfigurationError: the two are of kinds that can't be copied into each other.
    """
    landing = landing_for(target) if is_ordinary(target) else target
    try:
        subclasses.assign(landing, source, whole=whole)
    except Exception as error:  # of any operator of another library's class
        raise uncopied(item, error) from error
    if landing is not target:
        settle_into(item, target, landing)


def copy(item: ReadItem, target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy elements into the destination or a part of it; `settle` waits for them.

    Raises:
        ConfigurationError: they can't be copied there.
    """
    try:
        with torch.no_grad(), beside(target):
            target.copy_(source, non_blocking=True)
    except RuntimeError as error:
        raise uncopied(item, error) from error


def uncopied(item: ReadItem, error: Exception) -> ConfigurationError:
    """Say that a destination does not take what is stored for it."""
    return ConfigurationError(
        f"{item.dest_index.fqn!r} cannot be copied into the state's tensor: {error}",
        hint="Give it a destination like the tensor that was saved, with memory of its own",
    )
