"""Proof that a tensor subclass loads again as it is, made before it is saved."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.storage import TypedStorage

from cloudckpt.backends.state import stand_ins, subclasses
from cloudckpt.backends.torch_private import registered_globals, weights_only


def obstacle(tensor: torch.Tensor, *, trust: bool, in_place: bool) -> tuple[str, str] | None:
    """Say why a tensor subclass can't be saved or would not load again, and the cure; None where it does.

    It is pickled without its data and loaded again as ``torch.load`` would.

    Args:
        tensor: an instance of a subclass.
        trust: whether the checkpoint will be loaded with ``trust=True``.
        in_place: whether the state that it will be loaded into has a tensor of the same class.
    """
    try:
        TensorProperties.create_from_tensor(tensor)
    except Exception as error:  # noqa: BLE001 - an operator of another library's class may raise anything
        return (
            f"can't be planned by DCP, since its class lacks an operator: {type(error).__name__}: {error}",
            "Save the tensors that it is made of, as __tensor_flatten__ names them",
        )
    out = io.BytesIO()
    skeleton = _Skeleton(out)
    try:
        skeleton.dump(tensor)
    except Exception as error:  # noqa: BLE001 - as above
        return (
            f"can't be pickled: {type(error).__name__}: {error}",
            "Define its class at the top level of an importable module, and make its attributes plain data",
        )
    data = out.getvalue()
    try:
        again = skeleton.loaded(data, _Unrestricted if trust else weights_only.Unpickler)
    except Exception as error:  # noqa: BLE001 - as above
        if in_place and not trust and stand_ins.loaded_skeleton(skeleton, data, tensor) is not None:
            return None
        if not trust and (needed := _needed(data)):
            registered = f"torch.serialization.add_safe_globals([{', '.join(sorted(_names(needed)))}])"
            return (
                f"needs {', '.join(sorted(needed))} to load, which is not registered as safe",
                f"Call {registered} before saving and before loading, or pass trust=True",
            )
        return (
            f"does not load again: {type(error).__name__}: {error}",
            "Save the tensors that it is made of, as __tensor_flatten__ names them",
        )
    return _difference(tensor, again)


def _needed(data: bytes) -> set[str]:
    """Name the classes and functions in a pickle that ``weights_only`` refuses."""
    allowed = registered_globals()
    return set(weights_only.get_globals_in_pkl(io.BytesIO(data))) - allowed


def _names(needed: set[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in needed}


def _difference(tensor: torch.Tensor, again: object) -> tuple[str, str] | None:
    cure = "Save the tensors that it is made of, as __tensor_flatten__ names them"
    if not isinstance(again, torch.Tensor) or type(again) is not type(tensor):
        return f"loads as a {type(again).__name__}", cure
    for name in ("shape", "dtype", "layout", "requires_grad"):
        before, after = getattr(tensor, name), getattr(again, name)
        if before != after:
            return f"loads with {name} {after}, and has {before}", cure
    lost = subclasses.attributes(tensor).keys() ^ subclasses.attributes(again).keys()
    return (f"loads with other attributes: {', '.join(sorted(lost))}", cure) if lost else None


class _Skeleton(pickle.Pickler):
    """Pickles a subclass as ``torch.save`` does, and keeps plain tensors and storages aside."""

    def __init__(self, out: io.BytesIO) -> None:
        super().__init__(out, subclasses.PROTOCOL)
        self._kept: list[Any] = []

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) in (torch.Tensor, torch.nn.Parameter) or isinstance(
            obj, (TypedStorage, torch.UntypedStorage)
        ):
            self._kept.append(obj)
            return len(self._kept) - 1
        return None

    def loaded(self, data: bytes, unpickler_class: Callable[[io.BytesIO], Any]) -> object:
        """Load what was pickled."""
        unpickler = unpickler_class(io.BytesIO(data))
        unpickler.persistent_load = self._kept.__getitem__
        return unpickler.load()


class _Unrestricted(pickle._Unpickler):  # noqa: SLF001 - C's has no settable method
    """Python's own unpickler, for what this process has just pickled."""
