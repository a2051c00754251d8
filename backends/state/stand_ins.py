"""Loading a subclass that is not registered into a tensor of the same class, without running its code.

``torch.load`` makes only what ``add_safe_globals`` registered: a class's ``__setstate__`` could do anything.
Where the state has a tensor of that class already, only its content is needed. A passive class stands in for
it while the archive is read. The state's tensor takes the stand-in's tensors, and such plain values as it has
itself under the same names.
"""

from __future__ import annotations

import io
import types
from typing import Any, NoReturn

import torch

from cloudckpt.backends.state import subclasses
from cloudckpt.backends.state.codec.archive import checked_archive
from cloudckpt.backends.torch_private import unpickler_with

_VALUES = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size})


class _Front(torch.Tensor):
    """Stands in for a class without memory of its own."""

    stands_for: type[torch.Tensor]

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"a stand-in for {cls.stands_for.__qualname__} knows no operators")


class _Over(torch.Tensor):
    """Stands in for a class that adds to a tensor's own memory."""

    stands_for: type[torch.Tensor]


def load(data: memoryview | bytes, like: torch.Tensor) -> torch.Tensor | None:
    """Load an archive with stand-ins for the classes that a tensor is made of; None if that is not enough.

    Args:
        data: what ``torch.save`` wrote.
        like: the tensor of the state.
    """
    module = types.SimpleNamespace(__name__="pickle", Unpickler=_unpickler(like))
    stream = io.BytesIO(data)
    try:
        checked_archive(stream, len(data))
        loaded: object = torch.load(stream, pickle_module=module, weights_only=False)
    except Exception:  # noqa: BLE001 - the loader that refused it has said why
        return None
    return loaded if isinstance(loaded, torch.Tensor) and is_stand_in(loaded, like) else None


def loaded_skeleton(skeleton: Any, data: bytes, like: torch.Tensor) -> torch.Tensor | None:
    """Do the same with a pickle whose tensors are kept aside."""
    try:
        loaded = skeleton.loaded(data, _unpickler(like))
    except Exception:  # noqa: BLE001 - as above
        return None
    return loaded if isinstance(loaded, torch.Tensor) and is_stand_in(loaded, like) else None


def is_stand_in(tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """Return True if a tensor stands for one of the same class, shape, dtype and attributes."""
    if getattr(type(tensor), "stands_for", type(tensor)) is not type(like):
        return False
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        return False
    if subclasses.is_plain(tensor):
        return True
    ours, theirs = subclasses.attributes(like), subclasses.attributes(tensor)
    return ours.keys() == theirs.keys() and all(_fits(ours[name], value) for name, value in theirs.items())


def _fits(own: object, value: object) -> bool:
    if isinstance(own, torch.Tensor) and isinstance(value, torch.Tensor):
        return is_stand_in(value, own)
    return type(own) is type(value) and _is_value(own) and _is_value(value)


def _is_value(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return type(value) in (tuple, list, torch.Size) and all(map(_is_value, value))
    return type(value) in _VALUES


def _unpickler(like: torch.Tensor) -> type:
    """Make torch's own unpickler, with the stand-ins beside what is registered."""
    return unpickler_with(
        {f"{kind.__module__}.{kind.__qualname__}": _stand_in(kind) for kind in _kinds(like)}
    )


def _kinds(tensor: torch.Tensor) -> set[type[torch.Tensor]]:
    if subclasses.is_plain(tensor):
        return set()
    parts = (value for value in subclasses.attributes(tensor).values() if isinstance(value, torch.Tensor))
    return {type(tensor)}.union(*map(_kinds, parts))


def _stand_in(kind: type[torch.Tensor]) -> type[torch.Tensor]:
    asked, undispatched = _any(kind), _any(torch.Tensor)
    passive = _Over if asked.__torch_dispatch__ is undispatched.__torch_dispatch__ else _Front
    made: type[torch.Tensor] = _any(type)(kind.__qualname__, (passive,), {"stands_for": kind})
    return made


def _any(value: object) -> Any:
    """Return it without its type, for what torch's stubs leave out."""
    return value
