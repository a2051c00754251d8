"""Tensor subclasses are restored with everything that their classes keep, or refused by class."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.testing._internal.two_tensor import TwoTensor

import cloudckpt
from cloudckpt.backends.state import subclasses
from cloudckpt.backends.state.tensors import refusal
from cloudckpt.executor import ProcessExecutor
from support import states, tensor_classes
from support.snapshots import round_trip
from support.tensor_classes import Bare, Eager, measured

State = dict[str, Any]


def by_writer(state: State, folder: Path) -> None:
    dcp.save(state, storage_writer=cloudckpt.StorageWriter(folder))


def by_executor(state: State, folder: Path) -> None:
    with ProcessExecutor() as executor:
        executor.execute_save(state, storage_writer=cloudckpt.StorageWriter(folder)).result()


def by_stock(state: State, folder: Path) -> None:
    dcp.save(state, checkpoint_id=folder)


def from_reader(state: State, folder: Path) -> None:
    dcp.load(state, storage_reader=cloudckpt.StorageReader(folder))


def from_stock(state: State, folder: Path) -> None:
    dcp.load(state, checkpoint_id=folder)


def parts(tensor: Tensor) -> list[tuple[object, ...]]:
    """Everything that a tensor is: its class, its dtype and shape, and its attributes, down to memory."""
    if subclasses.is_plain(tensor):
        return [(tensor.dtype, tuple(tensor.shape), states.raw_bytes(tensor))]
    found: list[tuple[object, ...]] = [(type(tensor), tensor.dtype, tuple(tensor.shape))]
    if not subclasses.is_wrapper(tensor):
        found += parts(tensor.as_subclass(Tensor))
    for name, value in sorted(subclasses.attributes(tensor).items()):
        found += [(name, *part) for part in parts(value)] if isinstance(value, Tensor) else [(name, value)]
    return found


def two(value: float) -> TwoTensor:
    return TwoTensor(torch.full((4, 2), 1.0 * value), torch.full((4, 2), value + 1.0))  # type: ignore[no-untyped-call]


def nested(value: float) -> TwoTensor:
    return TwoTensor(two(value), two(value + 2))  # type: ignore[no-untyped-call]


OWN: dict[str, Callable[[float], Tensor]] = {
    "two": two,
    "nested": nested,
    "eager": lambda value: Eager(torch.full((3,), 1.0 * value), value),
    "measured": lambda value: measured(torch.full((3,), 1.0 * value), f"unit {value}"),
    "parameter": lambda value: torch.nn.Parameter(two(value)),
}


@pytest.mark.parametrize("save", [by_writer, by_executor], ids=["writer", "executor"])
def test_an_unregistered_subclass_is_loaded_into_one_of_its_class_without_running_its_code(
    tmp_path: Path, save: Callable[[State, Path], None]
) -> None:
    before = {name: make(2) for name, make in OWN.items()}
    save(before, tmp_path)
    after = {name: make(7) for name, make in OWN.items()}
    kept, awoken = dict(after), Eager.awoken
    from_reader(after, tmp_path)
    assert Eager.awoken == awoken
    for name, tensor in after.items():
        assert tensor is kept[name]
        assert parts(tensor) == parts(before[name])


@pytest.mark.parametrize("kind", OWN)
def test_an_unregistered_subclass_is_refused_where_no_tensor_of_its_class_awaits_it(kind: str) -> None:
    tensor = OWN[kind](2)
    refused = refusal(tensor)
    assert refused is not None
    assert refused.class_name == type(tensor).__name__
    assert type(tensor).__qualname__ in refused.reason
    assert f"add_safe_globals([{type(tensor).__name__}])" in refused.hint
    assert refusal(tensor, in_place=True) is None
    assert refusal(tensor, trust=True) is None
    with torch.serialization.safe_globals([type(tensor)]):
        assert refusal(tensor) is None


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("trust", [False, True], ids=["registered", "trusted"])
def test_a_subclass_is_loaded_as_itself(tmp_path: Path, kind: str, trust: bool) -> None:
    before = OWN[kind](2)
    by_writer({"x": before}, tmp_path)
    after = OWN[kind](5)
    reader = cloudckpt.StorageReader(tmp_path, trust=trust)
    with torch.serialization.safe_globals([] if trust else [type(before)]):
        dcp.load({"x": after}, storage_reader=reader)
    assert parts(after) == parts(before)


def test_an_unregistered_subclass_is_not_loaded_into_a_plain_tensor(tmp_path: Path) -> None:
    by_writer({"x": two(1)}, tmp_path)
    with pytest.raises(CheckpointException) as raised:
        from_reader({"x": torch.zeros(4, 2)}, tmp_path)
    error = raised.value.failures[0][0]
    assert isinstance(error, cloudckpt.UnsafeCheckpointError)
    assert "TwoTensor" in str(error)


def test_an_attribute_of_another_kind_is_not_put_on_a_tensor_without_trust(tmp_path: Path) -> None:
    by_writer({"x": measured(torch.ones(3), ["a", "list"])}, tmp_path)  # type: ignore[arg-type]
    after = measured(torch.zeros(3), "m")
    with pytest.raises(CheckpointException) as raised:
        from_reader({"x": after}, tmp_path)
    assert isinstance(raised.value.failures[0][0], cloudckpt.UnsafeCheckpointError)
    assert after.unit == "m"


def test_a_class_that_dcp_can_not_plan_is_refused() -> None:
    refused = refusal(Bare(torch.ones(3), 1.0), trust=True)
    assert refused is not None
    assert "operator" in refused.reason


def test_a_class_that_can_not_be_imported_is_refused_also_with_trust() -> None:
    class Local(Tensor):
        pass

    refused = refusal(torch.ones(3).as_subclass(Local), trust=True)
    assert refused is not None
    assert "pickled" in refused.reason
    assert "module" in refused.hint


def test_an_attribute_whose_class_is_not_registered_is_named() -> None:
    tensor = measured(torch.ones(3), Path("m"))  # type: ignore[arg-type]
    with torch.serialization.safe_globals([tensor_classes.Measured]):
        refused = refusal(tensor)
        assert refused is not None
        assert "PosixPath" in refused.reason
        assert "Measured" not in refused.hint


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_parts_of_large_storages_are_stored_without_the_rest() -> None:
    large = torch.arange(100_000.0)
    state = {
        "two": TwoTensor(large[:8], large.clone()[:8]),  # type: ignore[no-untyped-call]
        "measured": measured(large[:8], "m"),
        "quantized": torch.quantize_per_tensor(large, 0.1, 0, torch.qint8)[:8],
        "sparse": torch.sparse_coo_tensor(torch.tensor([[0, 1]]), large[:2], (4,), check_invariants=True),
    }
    for tensor in state.values():
        assert len(subclasses.serialize(tensor).getvalue()) < 5_000


def test_a_snapshot_keeps_the_class_and_the_attributes_of_a_subclass_with_memory() -> None:
    large = torch.arange(100_000.0)
    tensor = measured(large[:8], "kg")
    tensor.reference = torch.ones(2)  # type: ignore[attr-defined]
    with round_trip({"x": tensor, "again": tensor}) as (taken, restored):
        assert parts(restored["x"]) == parts(tensor)
        assert restored["again"] is restored["x"]
        assert taken.tensor_bytes < 1_000


LOW_BIT = ("AdamW8bit", "AdamW4bit", "AdamWFp8")


def trained(kind: str, dtype: torch.dtype, steps: int) -> State:
    """The state of a low-bit optimizer after some steps, as stock DCP describes it."""
    optim = pytest.importorskip("torchao.optim")
    torch.manual_seed(0)
    model = torch.nn.Linear(128, 128, dtype=dtype)
    optimizer = getattr(optim, kind)(model.parameters(), lr=1e-3)
    for step in range(steps):
        model(torch.full((2, 128), step + 1.0, dtype=dtype)).square().mean().backward()
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        optimizer.zero_grad()
    held: State = optimizer.state[model.weight]
    return {name: value for name, value in held.items() if isinstance(value, Tensor) and value.dim()}


@pytest.mark.parametrize("kind", LOW_BIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("load", [from_reader, from_stock], ids=["reader", "stock"])
def test_low_bit_optimizer_state_is_saved_as_it_is(
    tmp_path: Path, kind: str, dtype: torch.dtype, load: Callable[[State, Path], None]
) -> None:
    before = trained(kind, dtype, 3)
    assert all(value.dtype == dtype for value in before.values())
    assert [refusal(value) for value in before.values()] == [None] * len(before)
    by_writer(before, tmp_path)
    after = trained(kind, dtype, 1)
    load(after, tmp_path)
    for name, value in before.items():
        assert parts(after[name]) == parts(value)


@pytest.mark.parametrize("kind", LOW_BIT)
def test_low_bit_optimizer_state_goes_through_the_executor_and_from_stock(tmp_path: Path, kind: str) -> None:
    before = trained(kind, torch.float32, 3)
    by_executor(before, tmp_path / "executor")
    by_stock(before, tmp_path / "stock")
    for folder in ("executor", "stock"):
        after = trained(kind, torch.float32, 1)
        from_reader(after, tmp_path / folder)
        for name, value in before.items():
            assert parts(after[name]) == parts(value)


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_quantized_weights_are_restored_with_their_scales(tmp_path: Path, name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def weight(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16))
        quantization.quantize_(model, getattr(quantization, name)())
        made: Tensor = model.state_dict()["0.weight"]
        return made

    before, after = weight(0), weight(1)
    assert not subclasses.is_plain(before)
    assert refusal(before) is None
    by_writer({"w": before}, tmp_path)
    from_reader({"w": after}, tmp_path)
    assert parts(after) == parts(before)


@pytest.mark.parametrize("saved", [False, True], ids=["saved without", "saved with"])
@pytest.mark.parametrize("held", [False, True], ids=["held without", "held with"])
def test_a_tensor_that_a_class_keeps_only_at_times_is_restored_or_removed(
    tmp_path: Path, saved: bool, held: bool
) -> None:
    """A scale computed for other weights must not stay beside those that were loaded."""
    fsdp = pytest.importorskip("torchao.float8.fsdp_utils")
    linear = pytest.importorskip("torchao.float8.float8_training_tensor")
    tensors = pytest.importorskip("torchao.float8.config")

    def weight(value: float, scaled: bool) -> Tensor:
        config = linear.LinearMMConfig()
        scale = torch.tensor(value) if scaled else None
        made: Tensor = fsdp.WeightWithDynamicFloat8CastTensor(
            torch.full((4, 4), value), config, tensors.e4m3_dtype, scale
        )
        return made

    before, after = weight(2.0, saved), weight(3.0, held)
    assert refusal(before) is None
    by_writer({"w": before}, tmp_path)
    from_reader({"w": after}, tmp_path)
    assert parts(after) == parts(before)


class Taking(dcp.DefaultLoadPlanner):
    """Takes what is stored as more than its values, as a planner without destinations does."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[MetadataIndex, Tensor] = {}

    def take_tensor(self, read_item: dcp.ReadItem, tensor: Tensor) -> bool:
        self.taken[read_item.dest_index] = tensor
        return True


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")  # torch 2.14
def test_a_planner_may_take_a_subclass_as_it_is_stored(tmp_path: Path) -> None:
    before = {"two": two(3), "sparse": torch.eye(3).to_sparse(), "plain": torch.ones(4, 2)}
    by_writer(before, tmp_path)
    planner = Taking()
    after = {"two": torch.zeros(4, 2), "sparse": torch.zeros(3, 3), "plain": torch.zeros(4, 2)}
    with torch.serialization.safe_globals([TwoTensor]):
        dcp.load(after, storage_reader=cloudckpt.StorageReader(tmp_path), planner=planner)
    assert {index.fqn for index in planner.taken} == {"two", "sparse"}
    for index, tensor in planner.taken.items():
        assert type(tensor) is type(before[index.fqn])
        assert tensor.layout is before[index.fqn].layout
    assert torch.equal(after["plain"], before["plain"])


def test_what_is_serialized_is_what_torch_saves() -> None:
    plain = io.BytesIO()
    torch.save(two(1), plain)
    for data in (plain, subclasses.serialize(two(1))):
        data.seek(0)
        assert parts(torch.load(data, weights_only=False)) == parts(two(1))
