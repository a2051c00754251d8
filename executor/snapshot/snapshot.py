"""A snapshot: the state as it is now, its tensors' bytes in an arena and the rest pickled.

Pickling does the walking: it visits containers, values and objects in any nesting, keeps what is shared
shared, and hands every tensor over here instead of looking into it. A DTensor or ShardedTensor travels as
its local tensors and its description.
"""

from __future__ import annotations

import gc
import io
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.storage import TypedStorage

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.state import placements, sparse, subclasses, tensors
from cloudckpt.backends.state.markers import CheckpointState
from cloudckpt.backends.torch_private import (
    AsyncCollectiveTensor,
    ShardedTensor,
    is_zerotensor,
    local_tensor,
    sharded_tensor,
    spec_of,
    typed,
    untyped,
)
from cloudckpt.executor.snapshot import source_copy
from cloudckpt.executor.snapshot.arena import Arena
from cloudckpt.executor.snapshot.memory_layout import Layout, View, lay_out
from cloudckpt.executor.worker import main_unpickler

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_VALUES = frozenset({str, int, float, bool, dict, list, tuple, type(None)})
_NEVER_STATEFUL = _PLAIN | _VALUES | {DTensor}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot without its arena: everything else that the checkpoint process needs to restore the state.

    Attributes:
        pickled: the state without its tensors.
        meshes: pickled device meshes, which tensors share.
        views: a view for each tensor.
        extents: offset and size in the arena of what the views lie in, in bytes.
    """

    pickled: bytes
    meshes: tuple[bytes, ...]
    views: list[View]
    extents: list[tuple[int, int]]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensors, memory that they share counted once."""
        return sum(nbytes for _, nbytes in self.extents)


def take(state: Mapping[str, Any], arena: Arena) -> Snapshot:
    """Copy the state into the arena; from its return on, the state may change.

    Raises:
        ConfigurationError: a value can't be pickled.
        ExecutorError: there is not enough memory.
    """
    with _without_collection():
        pickled, collector, layout = _described(state)
    arena.reserve(layout.nbytes)
    source_copy.copy(layout, arena)
    extents = [(offset, source.nbytes) for source, offset in zip(layout.sources, layout.offsets, strict=True)]
    return Snapshot(pickled, tuple(collector.meshes.values()), layout.views, extents)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector, which thousands of new tuples would wake, from taking as long again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def layout_of(state: Mapping[str, Any]) -> Layout:
    """Return the layout that a snapshot of the state has in an arena."""
    return _described(state)[2]


def restore(taken: Snapshot, arena: Arena) -> dict[str, Any]:
    """Return the state, its tensors over the arena: they last until another snapshot is taken into it."""
    with sparse.unlisted():
        return _Restorer(taken, arena).load()  # type: ignore[no-any-return]


def _described(state: Mapping[str, Any]) -> tuple[bytes, _Collector, Layout]:
    # As DCP does: objects with a state_dict() stand for it, at the top level.
    described: Mapping[str, Any] = state
    if not isinstance(state, CheckpointState):
        described = {
            key: value.state_dict() if _is_stateful(value) else value for key, value in state.items()
        }
    out = io.BytesIO()
    collector = _Collector(out)
    try:
        collector.dump(described)
    except _RefusedError as error:
        raise ConfigurationError(f"{_culprit(described)} {error.why.reason}", hint=error.why.hint) from None
    except Exception as error:
        raise ConfigurationError(
            f"{_culprit(described)} can't be pickled: {type(error).__name__}: {error}",
            hint="A state holds tensors and values that pickle; leave this out or make plain data of it",
        ) from error
    return out.getvalue(), collector, lay_out(collector.tensors)


def _is_stateful(value: Any) -> TypeGuard[Stateful]:
    # Asking a protocol is slow, and states of thousands of tensors may be flat.
    return type(value) not in _NEVER_STATEFUL and isinstance(value, Stateful)


def _culprit(state: Mapping[str, Any], above: str = "") -> str:
    """Return the deepest key whose value doesn't pickle."""
    for key, value in state.items():
        try:
            _Collector(io.BytesIO()).dump(value)
        except Exception:  # noqa: BLE001 - it has been caught once already
            path = f"{above}{key}"
            return _culprit(value, f"{path}.") if isinstance(value, Mapping) else f"the value at {path!r}"
    return f"the value at {above.rstrip('.')!r}" if above else "the state"


class _RefusedError(Exception):
    """A value that can't be saved."""

    def __init__(self, why: tensors.Refusal | main_unpickler.Unimportable) -> None:
        super().__init__(why.reason)
        self.why = why


class _Collector(pickle.Pickler):
    """Pickles a state and sets its tensors aside, as numbers."""

    def __init__(self, out: io.BytesIO) -> None:
        super().__init__(out, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self.meshes: dict[int, bytes] = {}
        self._mesh_numbers: dict[int, int] = {}
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []

    def persistent_id(self, obj: Any) -> Any:
        """Return a description of what is not pickled as it is, or None."""
        if type(obj) in _VALUES:
            return None
        if isinstance(obj, torch.Tensor):
            return self._tensor(obj)
        if isinstance(obj, DeviceMesh):
            return ("mesh", self._mesh(obj))
        if isinstance(obj, TypedStorage):
            return ("typed", self._storage(untyped(obj)), obj.dtype)
        if isinstance(obj, torch.UntypedStorage):
            return ("storage", self._storage(obj))
        return None

    def reducer_override(self, obj: Any) -> Any:
        """Restore a wrapper of tensors on a device on the host, and refuse what could not be restored."""
        if (why := main_unpickler.unimportable(obj)) is not None:
            raise _RefusedError(why)
        if isinstance(obj, torch.Tensor) and subclasses.is_wrapper(obj):
            return subclasses.reduce_to_host(obj)
        return NotImplemented

    def _tensor(self, tensor: torch.Tensor) -> Any:
        kind = type(tensor)
        shards = placements.shard_attributes(tensor)
        if (kind not in _PLAIN or shards is not None) and (why := tensors.unstorable(tensor)) is not None:
            raise _RefusedError(why)
        if isinstance(tensor, DTensor):
            return ("dtensor", local_tensor(tensor), spec_of(tensor))
        if isinstance(tensor, ShardedTensor):
            return ("sharded", tensor.local_shards(), tensor.metadata(), tensor.sharding_spec())
        if kind not in _PLAIN:
            if isinstance(tensor, AsyncCollectiveTensor):
                return self._tensor(tensor.wait())
            if subclasses.is_wrapper(tensor):
                return None  # its own pickling takes it apart, down to tensors with memory
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            return None
        zeros = is_zerotensor(tensor)
        number = self._number(tensor, tensor.clone() if zeros else tensor)
        if not subclasses.is_plain(tensor):
            return ("subclass", number, kind, tensor.requires_grad, subclasses.attributes(tensor))
        is_parameter = kind is not torch.Tensor
        if shards is not None:
            return ("shards", number, is_parameter, tensor.requires_grad, tuple(shards))
        if is_parameter or tensor.requires_grad:
            return ("leaf", number, is_parameter, tensor.requires_grad)
        return number

    def _number(self, key: Any, tensor: torch.Tensor) -> int:
        number = self._numbers.get(id(key))
        if number is None:
            number = self._numbers[id(key)] = len(self.tensors)
            self._alive.append(key)  # or its id could come again
            self.tensors.append(tensor.detach())
        return number

    def _storage(self, storage: torch.UntypedStorage) -> int:
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device)
        whole.set_(storage, 0, (storage.nbytes(),), (1,))
        return self._number(storage, whole)

    def _mesh(self, mesh: DeviceMesh) -> int:
        """Pickled on its own: its tensors are no state, and outlive the arena's next snapshot."""
        if id(mesh) not in self.meshes:
            self.meshes[id(mesh)] = pickle.dumps(mesh)
            self._alive.append(mesh)
            self._mesh_numbers[id(mesh)] = len(self._mesh_numbers)
        return self._mesh_numbers[id(mesh)]


class _Restorer(main_unpickler.Unpickler):
    """Unpickles a state, with tensors over the arena for the numbers in it."""

    def __init__(self, taken: Snapshot, arena: Arena) -> None:
        super().__init__(io.BytesIO(taken.pickled))
        self._extents = [arena.bytes_at(*extent).untyped_storage() for extent in taken.extents]
        self._tensors = [self._view(view) for view in taken.views]
        self._leaves: dict[int, torch.Tensor] = {}
        self._meshes = [main_unpickler.loads(mesh) for mesh in taken.meshes]

    def persistent_load(self, pid: Any) -> Any:
        """Return the object that `_Collector.persistent_id` described."""
        match pid:
            case int():
                return self._tensors[pid]
            case ("leaf", number, is_parameter, requires_grad):
                return self._leaf(number, is_parameter, requires_grad)
            case ("shards", number, is_parameter, requires_grad, shards):
                tensor = self._leaf(number, is_parameter, requires_grad)
                placements.ShardAttributes(*shards).put_on(tensor)
                return tensor
            case ("subclass", number, kind, requires_grad, attributes):
                if number not in self._leaves:
                    tensor = self._tensors[number].as_subclass(kind).requires_grad_(requires_grad)
                    self._leaves[number] = tensor
                    for name, value in attributes.items():
                        setattr(tensor, name, value)
                return self._leaves[number]
            case ("mesh", number):
                return self._meshes[number]
            case ("dtensor", local, spec):
                return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]
            case ("sharded", shards, metadata, spec):
                return sharded_tensor(shards, metadata, spec)
            case ("typed", number, dtype):
                storage = self._tensors[number].untyped_storage()
                return typed(storage, dtype)
            case ("storage", number):
                return self._tensors[number].untyped_storage()
            case _:
                raise pickle.UnpicklingError(f"an unknown persistent id: {pid!r}")

    def _leaf(self, number: int, is_parameter: bool, requires_grad: bool) -> torch.Tensor:
        if number not in self._leaves:
            tensor = self._tensors[number].requires_grad_(requires_grad)
            self._leaves[number] = torch.nn.Parameter(tensor, requires_grad) if is_parameter else tensor
        return self._leaves[number]

    def _view(self, view: View) -> torch.Tensor:
        if view.extent < 0:
            return torch.empty_strided(view.shape, view.stride, dtype=view.dtype)
        tensor = torch.empty(0, dtype=view.dtype)
        return tensor.set_(
            self._extents[view.extent], view.offset // tensor.itemsize, view.shape, view.stride
        )
