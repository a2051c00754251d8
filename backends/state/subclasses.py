"""Tensor subclasses: serialised whole, and assigned in place.

A wrapper subclass stands in front of other tensors and has no memory of its own. Its class need not know the
operators that copy a tensor (``clone``, ``detach``, ``to``), and those that it knows may lose what is not a
tensor. Pickling takes it apart and loses nothing, which is what ``torch.save`` does and what happens here.
"""

from __future__ import annotations

import io
import pickle
import types
from collections.abc import Callable
from typing import Any

import torch

from cloudckpt.backends.torch_private import (
    is_traceable_wrapper_subclass,
    object_state,
    rebuild_from_type_v2,
    rebuild_wrapper_subclass,
)

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_COMPRESSED = frozenset({torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})
PROTOCOL = 2
"""Of pickle: the one that ``torch.save`` uses and that ``weights_only`` reads."""

_DEVICE = 6
"""Index of the device among the arguments of torch's ``_rebuild_wrapper_subclass``."""

_Reduced = tuple[Callable[..., Any], tuple[Any, ...]]


def is_wrapper(tensor: Any) -> bool:
    """Return True for a class that stands in front of other tensors, with no memory of its own."""
    if type(tensor) in _PLAIN:
        return False
    undispatched: Any = torch.Tensor
    return is_traceable_wrapper_subclass(tensor) or (
        type(tensor).__torch_dispatch__ is not undispatched.__torch_dispatch__
    )


def is_plain(tensor: torch.Tensor) -> bool:
    """Return True for a tensor or parameter whose class adds nothing that is stored."""
    return type(tensor) in _PLAIN or issubclass(type(tensor), torch.nn.Parameter)


def serialize(tensor: torch.Tensor) -> io.BytesIO:
    """Return what ``torch.save`` makes of a tensor, in host memory and without the rest of its storages."""
    whole = io.BytesIO()
    torch.save(tensor, whole, pickle_module=_COMPACTING, pickle_protocol=PROTOCOL)
    whole.seek(0)
    return whole


def reduce_to_host(tensor: torch.Tensor) -> Any:
    """Return ``tensor.__reduce_ex__()`` of a wrapper subclass on any device as one on the host.

    ``NotImplemented`` for what needs no such change.
    """
    if type(tensor).__reduce_ex__ is not torch.Tensor.__reduce_ex__ or tensor.device.type in ("cpu", "meta"):
        return NotImplemented
    rebuild, (inner, kind, arguments, state) = _any(tensor).__reduce_ex__(PROTOCOL)
    if inner is not rebuild_wrapper_subclass:  # how torch pickles one
        return NotImplemented
    on_host = (*arguments[:_DEVICE], torch.device("cpu"), *arguments[_DEVICE + 1 :])
    return rebuild, (inner, kind, on_host, state)


class _Compacting(pickle.Pickler):
    """Pickles tensors as they are, on the host, and without the parts of storages that they don't use."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        if is_wrapper(obj):
            return reduce_to_host(obj)
        if obj.layout is not torch.strided or type(obj).__reduce_ex__ is not torch.Tensor.__reduce_ex__:
            return NotImplemented  # reduced to plain tensors, which come here next
        if type(obj) is torch.nn.Parameter or obj.is_nested or obj.is_meta or _is_compact(obj):
            return NotImplemented
        with torch.no_grad():
            compact = obj.as_subclass(torch.Tensor).detach().cpu().clone()
        compact.requires_grad_(obj.requires_grad)
        rebuilt: _Reduced = _any(compact).__reduce_ex__(PROTOCOL)
        if type(obj) is torch.Tensor:
            return rebuilt
        state = _state(obj)
        return rebuild_from_type_v2, (rebuilt[0], type(obj), rebuilt[1], state)


_COMPACTING = types.SimpleNamespace(__name__="pickle", Pickler=_Compacting)


def _any(value: object) -> Any:
    """Return it without its type, for methods that torch leaves untyped."""
    return value


def _state(tensor: torch.Tensor) -> Any:
    return object_state(tensor)  # as Tensor.__reduce_ex__ does


def _is_compact(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() == tensor.nbytes


def attributes(tensor: torch.Tensor) -> dict[str, Any]:
    """Return the Python attributes that are pickled with a subclass."""
    state = _state(tensor)
    named, slots = state if isinstance(state, tuple) else (state, None)
    return {**(named or {}), **(slots or {})}


def assign(target: torch.Tensor, source: torch.Tensor, *, whole: bool) -> None:
    """Make a tensor equal another in place, with everything that its class keeps.

    Args:
        target: where to.
        source: what was loaded.
        whole: True where `target` is the state's own tensor, and not a part of it: attributes can be set.

    Raises:
        RuntimeError: the tensors are of kinds that can't be copied into each other.
        Exception: what an operator of another library's class raises.
    """
    with torch.no_grad():
        if target.layout in _COMPRESSED and target.layout is source.layout:
            target.resize_as_sparse_(source)  # copy_ wants as many elements there
            target.copy_(source)
        elif target.layout is source.layout is torch.sparse_coo:
            # copy_ changes no number of dimensions of a tensor with elements.
            target.sparse_resize_and_clear_(source.shape, source.sparse_dim(), source.dense_dim())
            target.copy_(source)
        elif _stood_for(source) is type(target) and not is_plain(target) and whole:
            _assign_attributes(target, source)
        else:
            target.copy_(source)


def _assign_attributes(target: torch.Tensor, source: torch.Tensor) -> None:
    if not is_wrapper(target):
        target.copy_(source.as_subclass(torch.Tensor))
    elif not _is_like(target, source):
        target.copy_(source)  # as its class converts it: the state asks for another dtype, say
        return
    ours, theirs = attributes(target), attributes(source)
    for name in ours.keys() - theirs.keys() - {_IS_PARAMETER}:
        delattr(target, name)
    for name, value in theirs.items():
        own = ours.get(name)
        if isinstance(own, torch.Tensor) and isinstance(value, torch.Tensor) and _is_like(own, value):
            assign(own, value, whole=True)  # into the memory that is there: others may share it
        elif name != _IS_PARAMETER:
            on_device = isinstance(value, torch.Tensor) and not is_wrapper(value)
            setattr(target, name, value.to(target.device) if on_device else value)


_IS_PARAMETER = "_is_param"
"""Attribute that ``torch.nn.Parameter`` sets on an instance of a subclass."""


def _is_like(one: torch.Tensor, other: torch.Tensor) -> bool:
    return type(one) is _stood_for(other) and one.shape == other.shape and one.dtype == other.dtype


def _stood_for(tensor: torch.Tensor) -> type[torch.Tensor]:
    """Return a tensor's class; for a stand-in, the class that it stands for."""
    kind: type[torch.Tensor] = getattr(type(tensor), "stands_for", type(tensor))
    return kind
