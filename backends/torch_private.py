"""Private names of torch: every one that the project uses is imported or called here.

torch may move them in any release. All exist since torch 2.9, the oldest supported release, unless a comment
says otherwise. A name without which no checkpoint can be read or written is imported as it is: its loss fails
the import with one clear ``ImportError``. Every other name has a fallback. A class becomes one without
instances. A function raises `ConfigurationError` with the missing name when it is called. Elsewhere a public
way takes its place. `tests/test_torch_private.py` fails when a release moves a name, and when another module
uses one.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Mapping, MutableMapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo, Store, Work, distributed_c10d
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.storage import TypedStorage

from cloudckpt.backends.errors import ConfigurationError

__all__ = [
    "MISSING",
    "AsyncCollectiveTensor",
    "DistWrapper",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensor",
    "Shard",
    "ShardedTensor",
    "ShardedTensorBase",
    "ShardedTensorMetadata",
    "StorageInfo",
    "StoragePrefix",
    "StridedShard",
    "archive_reader",
    "completed_work",
    "compute_local_shape_and_global_offset",
    "coordinates",
    "default_store",
    "element_size",
    "flatten_sharded_tensors",
    "flatten_state_dict",
    "get_layout",
    "gloo_options",
    "hybrid_sharding",
    "is_functional_tensor",
    "is_functorch_wrapped_tensor",
    "is_traceable_wrapper_subclass",
    "is_zerotensor",
    "local_tensor",
    "memory_formats",
    "names_of_parameter",
    "narrow_tensor_by_index",
    "object_device",
    "object_state",
    "plan_caches",
    "rebuild_from_type_v2",
    "rebuild_wrapper_subclass",
    "registered_globals",
    "set_gloo_timeout",
    "set_plan_cache_key",
    "set_tensor_metadata",
    "sharded_properties",
    "sharded_tensor",
    "spec_of",
    "storage_identity",
    "storage_types",
    "typed",
    "unpickler_with",
    "untyped",
    "unvalidated_sparse_tensors",
    "weights_only",
    "wrap_exception",
]

MISSING: Final[dict[str, str]] = {}
"""Private names that this torch does not have, each with what uses it."""


def _absent(path: str, used_for: str) -> ConfigurationError:
    return ConfigurationError(
        f"torch {torch.__version__} has no {path}, which cloudckpt uses {used_for}",
        hint="Install a release of torch that docs/versions.md lists, or a newer cloudckpt",
    )


def _function(module: str, name: str, used_for: str) -> Any:
    """Return a private name, or a function that raises ConfigurationError where torch has moved it."""
    path = f"{module}.{name}"
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        MISSING[path] = used_for

    def refuse(*_: object, **__: object) -> NoReturn:
        raise _absent(path, used_for)

    return refuse


def _class(module: str, name: str, used_for: str) -> Any:
    """Return a private class, or one without instances where torch has moved it."""
    found = _function(module, name, used_for)
    return found if isinstance(found, type) else type(name, (), {"__new__": found})


# The types of `.metadata`, and DCP's arithmetic on chunks. Without them nothing is read or written.
try:
    from torch.distributed._shard._utils import narrow_tensor_by_index
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict
    from torch.distributed.checkpoint.api import _wrap_exception as wrap_exception
    from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
    from torch.distributed.checkpoint.filesystem import _StoragePrefix as StoragePrefix
    from torch.distributed.checkpoint.utils import _DistWrapper as DistWrapper
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    from torch.serialization import _get_layout as get_layout
except ImportError as error:
    raise ImportError(
        f"this cloudckpt does not work with torch {torch.__version__}: {error}. "
        "Install a release of torch that docs/versions.md lists, or a newer cloudckpt",
        name=error.name,
        path=error.path,
    ) from error


if TYPE_CHECKING:
    from torch._C._functorch import is_functorch_wrapped_tensor
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch._subclasses.functional_tensor import FunctionalTensor
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
    from torch.distributed._shard.sharded_tensor.api import ShardedTensorBase
    from torch.distributed.tensor.placement_types import _StridedShard as StridedShard
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass
else:
    # Results of functional collectives, which are waited for before they are saved.
    AsyncCollectiveTensor = _class(
        "torch.distributed._functional_collectives", "AsyncCollectiveTensor", "to wait for a collective"
    )
    # Tensors without data, which are refused by name.
    FakeTensor = _class("torch._subclasses.fake_tensor", "FakeTensor", "to refuse traced tensors")
    FunctionalTensor = _class(
        "torch._subclasses.functional_tensor", "FunctionalTensor", "to refuse traced tensors"
    )
    is_functorch_wrapped_tensor = getattr(
        importlib.import_module("torch._C._functorch"), "is_functorch_wrapped_tensor", lambda _: False
    )
    # The frame of an item is pickled without its content.
    FakeTensorMode = _class("torch._subclasses.fake_tensor", "FakeTensorMode", "to frame large tensors")
    # Older sharded tensors, which FSDP1 still makes.
    _SHARDED: Final = "torch.distributed._shard.sharded_tensor"
    ShardedTensor = _class(_SHARDED, "ShardedTensor", "to save a ShardedTensor")
    ShardedTensorBase = _class(f"{_SHARDED}.api", "ShardedTensorBase", "to save a ShardedTensor")
    ShardedTensorMetadata = _class(_SHARDED, "ShardedTensorMetadata", "to save a ShardedTensor")
    Shard = _class(_SHARDED, "Shard", "to save a ShardedTensor")
    # FSDP2 with tensor parallelism places tensors by it.
    StridedShard = _class(
        "torch.distributed.tensor.placement_types", "_StridedShard", "to check strided placements"
    )
    is_traceable_wrapper_subclass = _function(
        "torch.utils._python_dispatch", "is_traceable_wrapper_subclass", "to save tensor subclasses"
    )

set_tensor_metadata: Final[Callable[..., None]] = _function(
    "torch._utils", "set_tensor_metadata", "to load conjugated and negated views"
)
flatten_sharded_tensors: Final[Callable[[dict[str, Any]], dict[str, Any]]] = _function(
    "torch.distributed.checkpoint._sharded_tensor_utils",
    "_flatten_sharded_tensors",
    "to save nested ShardedTensors",
)
rebuild_wrapper_subclass: Final[Callable[..., Any]] = _function(
    "torch._utils", "_rebuild_wrapper_subclass", "to save tensor subclasses"
)
rebuild_from_type_v2: Final[Callable[..., Any]] = _function(
    "torch._tensor", "_rebuild_from_type_v2", "to save tensor subclasses"
)
object_state: Final[Callable[[torch.Tensor], Any]] = _function(
    "torch._utils", "_get_obj_state", "to save tensor subclasses"
)
element_size: Final[Callable[[torch.dtype], int]] = _function(
    "torch._utils", "_element_size", "to find dtypes that DCP can't plan"
)
names_of_parameter: Final[Callable[[torch.nn.Module, str], set[str]]] = _function(
    "torch.distributed.checkpoint.state_dict", "_get_fqns", "to name the parameters of wrapped modules"
)
archive_reader: Final[Callable[..., Any]] = _function(
    "torch._C", "PyTorchFileReader", "to read what torch.save wrote"
)
weights_only: Final[Any] = importlib.import_module("torch._weights_only_unpickler")
"""The module of torch's unpickler that makes nothing but what is registered."""


# -- tensors ------------------------------------------------------------------------------------------------


def local_tensor(tensor: DTensor) -> torch.Tensor:
    """Return the shard of a DTensor itself; ``to_local()``, the fallback, makes a view of it."""
    local: torch.Tensor | None = getattr(tensor, "_local_tensor", None)
    return tensor.to_local() if local is None else local


def spec_of(tensor: DTensor) -> Any:
    """Return the mesh, placements and properties of a DTensor as the one object that its class takes."""
    try:
        return tensor._spec
    except AttributeError:
        raise _absent("torch.distributed.tensor.DTensor._spec", "to save a DTensor") from None


def is_zerotensor(tensor: torch.Tensor) -> bool:
    """Return True for a tensor of zeros without memory, as autograd makes; False where torch can't tell."""
    asked: Callable[[torch.Tensor], bool] = getattr(torch, "_is_zerotensor", lambda _: False)
    return asked(tensor)


def is_functional_tensor(tensor: torch.Tensor) -> bool:
    """Return True for a tensor of a program that is traced; False where torch can't tell."""
    asked: Callable[[torch.Tensor], bool] = getattr(torch, "_is_functional_tensor", lambda _: False)
    return asked(tensor)


def coordinates(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return indices and values of a sparse tensor; the public methods refuse one that is not coalesced."""
    return tensor._indices(), tensor._values()


def unvalidated_sparse_tensors() -> list[torch.Tensor]:
    """Return torch's own list of sparse tensors that were unpickled and not validated yet.

    One list for the process, and since torch 2.15 one for each thread.
    """
    module = importlib.import_module("torch._utils")
    if (of_thread := getattr(module, "_get_sparse_tensors_to_validate", None)) is not None:
        return cast("list[torch.Tensor]", of_thread())
    listed: list[torch.Tensor] = getattr(module, "_sparse_tensors_to_validate", [])
    return listed


def sharded_tensor(shards: list[Shard], metadata: ShardedTensorMetadata, spec: Any) -> ShardedTensor:
    """Make a ShardedTensor that has no process group."""
    made: Any = ShardedTensorBase._init_from_local_shards_and_global_metadata(shards, metadata, spec)
    made._metadata = metadata  # the original, with its placements
    made._process_group = made._sharded_tensor_id = None
    made._init_rrefs = False
    return made  # type: ignore[no-any-return]


def object_device(group: dist.ProcessGroup | None) -> torch.device:
    """Return the device whose tensors the collectives of a group take."""
    find: Callable[..., Any] = getattr(distributed_c10d, "_get_object_coll_device", lambda _: "cpu")
    return torch.device(find(group))


# -- storages -----------------------------------------------------------------------------------------------


def untyped(storage: TypedStorage) -> torch.UntypedStorage:
    """Return the memory of a typed storage; its public name warns that it will be removed."""
    return storage._untyped_storage


def typed(storage: torch.UntypedStorage, dtype: torch.dtype) -> TypedStorage:
    """Return a typed storage on this memory, without the warning that its class will be removed."""
    return TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def storage_identity(storage: torch.UntypedStorage) -> int:
    """Return what torch tells storages apart by, for as long as the storage exists."""
    return int(storage._cdata)


def storage_types() -> Mapping[torch.dtype, str]:
    """Return the name of the storage class of each dtype, as ``torch.save`` writes it."""
    try:
        found: Mapping[torch.dtype, str] = torch.storage._dtype_to_storage_type_map()
    except AttributeError:
        raise _absent("torch.storage._dtype_to_storage_type_map", "to load values") from None
    return found


# -- torch.load ---------------------------------------------------------------------------------------------


def registered_globals() -> set[str]:
    """Return the names that ``torch.load(weights_only=True)`` accepts: torch's own and those registered."""
    return {*weights_only._get_allowed_globals(), *weights_only._get_user_allowed_globals()}


def unpickler_with(more: Mapping[str, type]) -> type:
    """Return torch's own unpickler with more classes than are registered.

    torch's list is one for the process, and other threads are loading: a copy of the method reads another.
    """
    names = dict(vars(weights_only))
    names["_get_user_allowed_globals"] = lambda: {**more, **weights_only._get_user_allowed_globals()}
    method = types.FunctionType(weights_only.Unpickler.load.__code__, names, "load")
    return type("Unpickler", (weights_only.Unpickler,), {"load": method})


# -- .metadata ----------------------------------------------------------------------------------------------

_SHARDED_METADATA: Final = "torch.distributed._shard.sharded_tensor.metadata"


def sharded_properties() -> dict[tuple[str, str], type]:
    """Return the class that older `.metadata` has for the properties of a tensor, by module and name."""
    name = "TensorProperties"
    return {(_SHARDED_METADATA, name): _class(_SHARDED_METADATA, name, "to read older checkpoints")}


def memory_formats() -> dict[tuple[str, str], Callable[..., object]]:
    """Return the enumerations that `.metadata` has for memory formats, by module and name."""
    of_dcp, of_sharded = "torch.distributed.checkpoint.metadata", _SHARDED_METADATA
    named = ((of_dcp, "_MEM_FORMAT_ENCODING"), (of_sharded, "MEM_FORMAT_ENCODING"))
    return {(module, name): _function(module, name, "to read .metadata") for module, name in named}


# -- DCP and FSDP -------------------------------------------------------------------------------------------

_CACHES: Final = (
    "_cached_save_plan",
    "_cached_final_save_plan",
    "_cached_all_plans",
    "_cached_global_plan",
    "_cached_metadata",
)


def plan_caches() -> list[MutableMapping[str, Any]]:
    """Return the plans that DCP keeps on its class for the next save; it has no public way to drop one."""
    return [getattr(SavePlanner, name) for name in _CACHES if hasattr(SavePlanner, name)]


def set_plan_cache_key(planner: DefaultSavePlanner, key: str) -> None:
    """Name the plans of a planner; DCP's own key is the name of the class."""
    planner._cached_plans_key = key


def hybrid_sharding() -> tuple[Any, ...]:
    """Return FSDP's strategies that shard within a host and replicate between hosts."""
    from torch.distributed.fsdp import ShardingStrategy  # noqa: PLC0415 - slow, and for FSDP1 alone

    named = ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")  # the second has no public name
    return tuple(getattr(ShardingStrategy, name) for name in named if hasattr(ShardingStrategy, name))


# -- process groups -----------------------------------------------------------------------------------------


def default_store() -> Store:
    """Return the store of the default process group, with its prefixes."""
    try:
        found: Store = distributed_c10d._get_default_store()
    except AttributeError:
        raise _absent("torch.distributed.distributed_c10d._get_default_store", "to rendezvous") from None
    return found


def gloo_options(address: str, timeout: float) -> Any:
    """Return options of gloo for one address of this host; ``timeout`` is in seconds."""
    gloo: Any = ProcessGroupGloo  # torch's stub lacks the options
    try:
        options = gloo._Options()
        options._timeout = timedelta(seconds=timeout)
        options._devices = [gloo.create_device(hostname=address)]
    except AttributeError:
        raise _absent("torch.distributed.ProcessGroupGloo._Options", "for the option `interface`") from None
    return options


def set_gloo_timeout(backend: ProcessGroupGloo, timeout: float) -> None:
    """Set the timeout of collectives, in seconds."""
    backend._set_default_timeout(timedelta(seconds=timeout))


def completed_work(future: Future[Any]) -> Work:
    """Return the handle of a collective whose result the future has."""
    create: Callable[[Future[Any]], Work] = _function(
        "torch._C._distributed_c10d", "_create_work_from_future", "for process groups without connections"
    )
    return create(future)
