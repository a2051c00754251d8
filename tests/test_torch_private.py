"""The adapter for private names of torch: each does what it did, and no other module has one.

A release of torch that moves a name fails here, by that name.
"""

from __future__ import annotations

import ast
import inspect
import io
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.futures import Future

from cloudckpt.backends import torch_private as private

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("backends", "executor", "cloudckpt")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "__pycache__" not in path.parts and path.name != "torch_private.py"
]
OF_OBJECTS = {
    "_cdata",
    "_untyped_storage",
    "_local_tensor",
    "_indices",
    "_values",
    "_cached_plans_key",
    *("_cached_save_plan", "_cached_final_save_plan", "_cached_all_plans", "_cached_global_plan"),
    *("_is_zerotensor", "_is_functional_tensor", "_get_default_store", "_Options", "_devices"),
    *("_set_default_timeout", "_create_work_from_future", "_init_from_local_shards_and_global_metadata"),
    *("_dtype_to_storage_type_map", "_sparse_tensors_to_validate", "_element_size", "_get_obj_state"),
}
"""Private attributes of torch's objects, whose type the syntax tree does not show."""


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_names(source: str) -> Iterator[str]:
    """Find private names of torch that a module imports, or reaches through a module or an object."""
    tree = ast.parse(source)
    imported = dict(_imported(tree))
    yield from filter(_is_private, imported.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            of_module = isinstance(base, ast.Name) and base.id in imported
            if of_module or (node.attr in OF_OBJECTS and not _is_self(node.value)):
                yield ast.unparse(node)


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield what is imported of torch: the name in the module, and the full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = ((one, one.name) for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            named = ((one, f"{node.module}.{one.name}") for one in node.names)
        else:
            continue
        for one, full in named:
            if full.partition(".")[0] == "torch":
                yield (
                    one.asname or (full.partition(".")[0] if isinstance(node, ast.Import) else one.name),
                    full,
                )


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_uses_a_private_name_of_torch(path: Path) -> None:
    assert not list(private_names(path.read_text())), "import it from cloudckpt.backends.torch_private"


@pytest.mark.parametrize(
    "source",
    [
        "from torch._utils import _element_size",
        "from torch.distributed.checkpoint.filesystem import _StorageInfo",
        "import torch._weights_only_unpickler",
        "import torch\ntorch._is_zerotensor(x)",
        "import torch.distributed as dist\ndist.distributed_c10d._world",
        "from torch.distributed import distributed_c10d\ndistributed_c10d._get_default_store()",
        "def f(tensor): return tensor._local_tensor",
    ],
)
def test_a_private_name_elsewhere_is_caught(source: str) -> None:
    assert list(private_names(source))


def test_this_torch_has_every_name() -> None:
    assert not private.MISSING


@pytest.mark.parametrize("name", [one for one in private.__all__ if one != "MISSING"])
def test_every_name_is_exported(name: str) -> None:
    assert getattr(private, name) is not None


def test_the_types_of_metadata_have_the_fields_that_are_stored() -> None:
    info = private.StorageInfo("object", 1, 2)
    assert (info.relative_path, info.offset, info.length) == ("object", 1, 2)
    assert private.StorageInfo.__module__ == "torch.distributed.checkpoint.filesystem"
    assert pickle.loads(pickle.dumps(private.StoragePrefix("x"))).prefix == "x"
    assert set(map(callable, private.memory_formats().values())) == {True}
    assert set(map(callable, private.sharded_properties().values())) == {True}
    layout: Any = private.get_layout
    assert layout("torch.strided") is torch.strided


def test_dcp_flattens_and_narrows_as_it_did() -> None:
    flat, paths = private.flatten_state_dict({"a": {"b": torch.zeros(1), "c": [1]}})
    module = torch.nn.Linear(1, 1)
    assert private.names_of_parameter(module, "weight") == {"weight"}
    assert set(flat) == {"a.b", "a.c"} == set(paths)
    assert private.narrow_tensor_by_index(torch.arange(9), [2], [3]).tolist() == [2, 3, 4]
    assert private.flatten_sharded_tensors({"x": 1}) == {"x": 1}


def test_tensors_are_told_apart() -> None:
    plain = torch.zeros(2)
    assert not private.is_zerotensor(plain) and private.is_zerotensor(torch._efficientzerotensor(2))
    assert not private.is_functional_tensor(plain)
    assert not private.is_functorch_wrapped_tensor(plain)
    assert not private.is_traceable_wrapper_subclass(cast("object", plain))
    with private.FakeTensorMode():
        assert isinstance(torch.zeros(2), private.FakeTensor)
    seen: list[bool] = []

    def look(one: torch.Tensor) -> torch.Tensor:
        seen.append(private.is_functorch_wrapped_tensor(one))
        return one

    torch.func.vmap(look)(plain)
    assert seen == [True]
    assert private.element_size(torch.float64) == 8
    with pytest.raises(TypeError):
        private.element_size(cast("Any", torch).uint1)


def test_sparse_tensors_are_taken_apart_and_listed() -> None:
    made = torch.sparse_coo_tensor(
        torch.tensor([[1, 1]]), torch.tensor([2.0, 3.0]), (4,), check_invariants=True
    )
    indices, values = private.coordinates(made)
    assert (indices.tolist(), values.tolist()) == ([[1, 1]], [2.0, 3.0])
    data = pickle.dumps(made)
    before = len(private.unvalidated_sparse_tensors())
    _ = pickle.loads(data)
    assert len(private.unvalidated_sparse_tensors()) == before + 1
    private.unvalidated_sparse_tensors().clear()


def test_storages_are_reached_without_warnings() -> None:
    memory = torch.arange(3.0).untyped_storage()
    typed = private.typed(memory, torch.float32)
    assert private.untyped(typed).data_ptr() == memory.data_ptr()
    assert private.storage_identity(private.untyped(typed)) == private.storage_identity(memory)
    assert private.storage_types()[torch.float32] == "FloatStorage"


def test_an_archive_is_read_record_by_record() -> None:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream)
    stream.seek(0)
    archive = private.archive_reader(stream)
    assert archive.get_record("data.pkl").startswith(b"\x80")
    assert "data.pkl" in archive.get_all_records()


class Unregistered:
    """A class that nobody has registered as safe."""


def test_the_careful_unpickler_takes_more_classes_for_one_load() -> None:
    data = pickle.dumps(Unregistered(), protocol=2)
    name = f"{Unregistered.__module__}.{Unregistered.__qualname__}"
    with pytest.raises(pickle.UnpicklingError):
        private.weights_only.Unpickler(io.BytesIO(data)).load()
    loaded: Any = private.unpickler_with({name: Unregistered})
    assert isinstance(loaded(io.BytesIO(data)).load(), Unregistered)
    assert name not in private.registered_globals()
    assert name in private.weights_only.get_globals_in_pkl(io.BytesIO(data))


def test_subclasses_are_rebuilt_from_their_parts() -> None:
    tensor = torch.ones(2)
    rebuilt = private.rebuild_from_type_v2(lambda: tensor, torch.nn.Parameter, (), {})
    assert isinstance(rebuilt, torch.Tensor)
    kept: Any = torch.ones(2)
    kept.mark = 1
    assert private.object_state(kept) == {"mark": 1}
    assert inspect.signature(private.rebuild_wrapper_subclass).parameters.keys() >= {"cls", "dtype", "size"}


def test_plans_of_dcp_can_be_named_and_dropped() -> None:
    caches = private.plan_caches()
    assert len(caches) == 5
    assert all(any(one is vars(SavePlanner).get(name) for name in vars(SavePlanner)) for one in caches)
    planner = DefaultSavePlanner(enable_plan_caching=True)
    assert isinstance(planner._cached_plans_key, str)
    private.set_plan_cache_key(planner, "mine")
    planner.set_up_planner({"a": torch.ones(1)}, is_coordinator=True)
    planner.create_global_plan([planner.create_local_plan()])
    assert sum("mine" in one for one in caches) >= 3  # four before torch 2.13
    for one in caches:
        one.pop("mine", None)


def test_fsdp_has_both_hybrid_strategies() -> None:
    assert {one.name for one in private.hybrid_sharding()} == {"HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"}


def test_names_of_process_groups_work(tmp_path: Path) -> None:
    future: Future[Any] = Future()
    future.set_result([1])
    work = private.completed_work(future)
    assert work.wait() and work.is_completed()
    options = private.gloo_options("127.0.0.1", 7.0)
    assert options._timeout == timedelta(seconds=7)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        private.default_store().set("key", "value")
        assert private.default_store().get("key") == b"value"
        backend: Any = dist.group.WORLD
        private.set_gloo_timeout(backend._get_backend(torch.device("cpu")), 7.0)
        ranks: Any = private.DistWrapper(None, use_dist=True, coordinator_rank=0)
        assert ranks.all_gather_object(MetadataIndex("a")) == [MetadataIndex("a")]
        mesh = init_device_mesh("cpu", (1,))
        tensor = distribute_tensor(torch.ones(2), mesh, [Replicate()])
        assert private.local_tensor(tensor) is tensor._local_tensor
        again = DTensor(private.local_tensor(tensor), private.spec_of(tensor), requires_grad=False)  # type: ignore[no-untyped-call]
        assert again.placements == tensor.placements
        shape, offsets = private.compute_local_shape_and_global_offset((2,), mesh, [Replicate()])
        assert (tuple(shape), tuple(offsets)) == ((2,), (0,))
    finally:
        dist.destroy_process_group()
    error, _ = private.wrap_exception(ValueError("x"))
    assert isinstance(error, ValueError)


def succeeds(code: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_a_missing_optional_name_is_refused_at_use_and_not_at_import() -> None:
    succeeds(
        """
        import torch, torch.distributed.checkpoint as dcp
        import torch._utils, torch._tensor, torch.storage
        from torch.distributed._functional_collectives import AsyncCollectiveTensor
        import torch.distributed._functional_collectives as collectives
        import torch.distributed._shard.sharded_tensor as sharded
        del collectives.AsyncCollectiveTensor, sharded.Shard, torch._is_zerotensor
        del torch._tensor._rebuild_from_type_v2
        import cloudckpt
        from cloudckpt.backends import torch_private as private
        assert set(private.MISSING) == {
            "torch.distributed._functional_collectives.AsyncCollectiveTensor",
            "torch.distributed._shard.sharded_tensor.Shard",
            "torch._tensor._rebuild_from_type_v2",
        }, private.MISSING
        state = {"a": torch.arange(5)}
        dcp.save(state, storage_writer=cloudckpt.StorageWriter("memory://x"), no_dist=True)
        again = {"a": torch.zeros(5, dtype=torch.int64)}
        dcp.load(again, storage_reader=cloudckpt.StorageReader("memory://x"), no_dist=True)
        assert again["a"].tolist() == [0, 1, 2, 3, 4]
        assert not private.is_zerotensor(state["a"])
        for missing in (private.rebuild_from_type_v2, private.Shard):
            try:
                missing(state["a"])
            except cloudckpt.ConfigurationError as error:
                assert torch.__version__ in str(error) and "docs/versions.md" in str(error), error
            else:
                raise AssertionError(missing)
        """
    )


def test_a_missing_name_that_everything_needs_fails_the_import_with_what_to_do() -> None:
    succeeds(
        """
        import torch, torch.distributed.checkpoint.filesystem as filesystem
        del filesystem._StorageInfo
        import cloudckpt
        try:
            cloudckpt.StorageWriter
        except ImportError as error:
            assert torch.__version__ in str(error) and "_StorageInfo" in str(error), error
            assert "docs/versions.md" in str(error), error
        else:
            raise AssertionError
        """
    )
