"""A snapshot is the state as it was: every bit, every kind of value, and what is shared still shared."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.tensor import DTensor
from torch.testing._internal.two_tensor import TwoTensor

import cloudckpt
from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.strides import span
from cloudckpt.executor import ProcessExecutor
from cloudckpt.executor.snapshot import snapshot
from cloudckpt.executor.snapshot.arena import Arena
from support import states
from support.ranks import RankPools
from support.snapshots import State, plain, planned, round_trip

ALIGNMENT = 64
"""Bytes by which a copied stretch may be longer than what is in it."""

SAVES = 50

DTYPES = (
    *states.DTYPES,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fnuz,
    torch.float8_e8m0fnu,
)


class Point(NamedTuple):
    x: Tensor
    y: int


@dataclass
class Moments:
    step: int
    mean: Tensor
    history: list[Tensor]


class Counter:
    """An object that DCP asks for its state."""

    def __init__(self, count: int) -> None:
        self.count = torch.tensor(count)

    def state_dict(self) -> State:
        return {"count": self.count, "kind": "counter"}

    def load_state_dict(self, state: State) -> None:
        self.count = state["count"]


def address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def assert_comes_back(value: Any) -> None:
    with round_trip({"value": value}) as (_, restored):
        states.assert_bit_exact(restored, plain({"value": value}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5, 3), (2, 0, 3)], ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_comes_back(states.content(f"snapshot {dtype}", shape, dtype))


@pytest.mark.parametrize("name", sorted(states._layouts()))
def test_every_layout_comes_back_bit_for_bit(name: str) -> None:
    assert_comes_back(states._layouts()[name])


def test_a_state_of_everything_comes_back_bit_for_bit() -> None:
    state = states.build(None, big=False)
    with round_trip(state) as (_, restored):
        states.assert_bit_exact(restored, plain(state))


def test_large_tensors_come_back_bit_for_bit() -> None:
    large = states.content("large", (1 << 20,), torch.float32)
    assert_comes_back(
        {"whole": large, "matrix": large.view(1024, 1024).t(), "columns": large.view(256, -1)[:, ::3]}
    )


def test_it_is_the_state_of_the_moment_in_which_it_was_taken() -> None:
    state: State = {"tensor": torch.ones(1000), "list": [1], "inner": {"array": np.ones(3)}}
    with round_trip(state) as (_, restored):
        state["tensor"].zero_()
        state["list"].append(2)
        state["inner"]["array"][:] = 0
        assert torch.equal(restored["tensor"], torch.ones(1000))
        assert restored["list"] == [1]
        assert restored["inner"]["array"].tolist() == [1, 1, 1]


def test_a_parameter_comes_back_without_its_graph() -> None:
    weight = nn.Parameter(torch.ones(3))
    with round_trip({"weight": weight, "result": weight * 2}) as (_, restored):
        assert torch.equal(restored["weight"], torch.ones(3))
        assert torch.equal(restored["result"], torch.full((3,), 2.0))
        assert type(restored["weight"]) is nn.Parameter
        assert restored["weight"].requires_grad
        assert restored["result"].grad_fn is None
        assert restored["result"].is_leaf


def test_a_module_within_a_value_comes_back_ready_to_train() -> None:
    linear = nn.Linear(3, 2)
    linear.bias.requires_grad_(False)
    with round_trip({"modules": [linear, linear]}) as (_, restored):
        first, second = restored["modules"]
        assert first is second
        assert [type(p) for p in first.parameters()] == [nn.Parameter] * 2
        assert [p.requires_grad for p in first.parameters()] == [True, False]
        first(torch.ones(3)).sum().backward()
        assert first.weight.grad is not None


def test_zeros_that_were_never_written_are_zeros() -> None:
    with round_trip({"zeros": torch._efficientzerotensor(3)}) as (_, restored):
        assert torch.equal(restored["zeros"], torch.zeros(3))


@pytest.mark.parametrize(
    "view",
    [
        lambda big: big[:, 3],
        lambda big: big[::2, ::64],
        lambda big: big.t()[5],
        lambda big: torch.view_as_complex(big.view(4096, 512, 2))[:, 7].conj(),
    ],
    ids=["column", "steps", "row of the transposed", "conjugated"],
)
def test_scattered_elements_take_their_own_size_and_not_their_span(view: Callable[[Tensor], Tensor]) -> None:
    part = view(states.content("scattered", (4096, 1024), torch.float32))
    with round_trip({"part": part}) as (taken, restored):
        assert taken.tensor_bytes == part.numel() * part.itemsize
        assert states.raw_bytes(restored["part"]) == states.raw_bytes(part)


def test_a_small_view_of_a_huge_storage_takes_its_own_size() -> None:
    huge = torch.zeros(64 << 20, dtype=torch.uint8)
    state = {"first": huge[1000:1100], "last": huge[-100:], "one": huge[12345]}
    with round_trip(state) as (taken, restored):
        assert taken.tensor_bytes <= 201 + 3 * ALIGNMENT
        states.assert_bit_exact(restored, state)


def test_an_expanded_tensor_takes_the_size_of_what_it_repeats() -> None:
    wide = torch.tensor([[1.0], [2.0]]).expand(2, 1_000_000)
    with round_trip({"wide": wide}) as (taken, restored):
        assert taken.tensor_bytes <= ALIGNMENT
        assert torch.equal(restored["wide"], wide)


def test_tensors_that_share_memory_are_copied_once_and_share_it_again() -> None:
    base = states.content("base", (64, 64), torch.float32)
    state = {"base": base, "rows": base[2:9], "flat": base.view(-1), "bytes": base.view(torch.uint8)}
    with round_trip(state) as (taken, restored):
        assert taken.tensor_bytes == base.nbytes
        states.assert_bit_exact(restored, state)
        restored["base"].zero_()
        for name in ("rows", "flat", "bytes"):
            assert not restored[name].count_nonzero(), name


def test_views_that_overlap_in_part_share_what_they_overlap_in() -> None:
    base = states.content("overlap", (300,), torch.int16)
    state = {"left": base[7:130], "right": base[100:291], "middle": base[120:121]}
    with round_trip(state) as (taken, restored):
        assert taken.tensor_bytes <= (291 - 7) * 2 + ALIGNMENT
        states.assert_bit_exact(restored, state)
        assert address(restored["right"]) - address(restored["left"]) == (100 - 7) * 2
        assert address(restored["middle"]) - address(restored["left"]) == (120 - 7) * 2


def test_one_object_in_two_places_stays_one_object() -> None:
    tied, shared = torch.ones(5), [1, 2]
    state: State = {"a": tied, "b": {"again": tied}, "c": shared, "d": [shared]}
    with round_trip(state) as (_, restored):
        assert restored["b"]["again"] is restored["a"]
        assert restored["d"][0] is restored["c"]


def test_containers_of_every_kind_keep_kind_order_and_tensors() -> None:
    def tensor(name: str) -> Tensor:
        return states.content(name, (3, 2), torch.bfloat16)

    state: State = {
        "ordered": OrderedDict([("z", tensor("z")), ("a", tensor("a"))]),
        "list": [tensor("0"), (tensor("1"), {"deep": [tensor("2")]})],
        "point": Point(tensor("x"), 5),
        "set": {1, "two"},
        "keys": {5: "a key that is no string", None: 1},
    }
    moments = Moments(3, tensor("mean"), [tensor("h0"), tensor("h1")])
    with round_trip({**state, "moments": moments}) as (_, restored):
        again = restored.pop("moments")
        states.assert_bit_exact(restored, state)
        assert type(restored["ordered"]) is OrderedDict
        assert type(again) is Moments
        states.assert_bit_exact(vars(again), vars(moments))


def test_objects_with_a_state_dict_are_told_by_it() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with round_trip({"counter": Counter(8), "module": module}) as (_, restored):
        states.assert_bit_exact(restored["counter"], Counter(8).state_dict())
        states.assert_bit_exact(restored["module"], module.state_dict())


def test_a_module_inside_a_container_comes_back_with_its_content() -> None:
    module = nn.Linear(4, 3)
    with round_trip({"modules": [module]}) as (taken, restored):
        (again,) = restored["modules"]
        assert taken.tensor_bytes <= (4 * 3 + 3) * 4
        assert type(again) is nn.Linear
        states.assert_bit_exact(again.state_dict(), module.state_dict())
        assert torch.equal(again(torch.ones(1, 4)), module(torch.ones(1, 4)))


def test_arrays_and_plain_values_come_back() -> None:
    arrays: dict[str, Any] = {
        "matrix": np.arange(12, dtype=np.float16).reshape(3, 4),
        "scalar": np.float64(0.1),
        "objects": np.array([None, "two"], dtype=object),
    }
    with round_trip({"arrays": arrays, "plain": states._plain_values()}) as (_, restored):
        states.assert_bit_exact(restored["plain"], states._plain_values())
        for name, array in arrays.items():
            assert np.array_equal(restored["arrays"][name], array), name
            assert restored["arrays"][name].dtype == array.dtype


def test_sparse_tensors_come_back() -> None:
    dense = torch.eye(6)[1:4] * 0.3
    sparse = dense.to_sparse().coalesce()
    with round_trip({"sparse": sparse}) as (taken, restored):
        again = restored["sparse"]
        assert again.layout is torch.sparse_coo
        assert again.is_coalesced()
        assert torch.equal(again.to_dense(), dense)
        assert taken.tensor_bytes > 0  # its parts are in the arena, not in the pickle


def test_tensors_that_are_made_while_pickling_are_not_taken_for_each_other() -> None:
    """The parts of a sparse tensor are new objects each time, whose ids may come again."""
    dense = [torch.diag(states.content(f"{number}", (5,), torch.int32)) for number in range(200)]
    with round_trip({"sparse": [tensor.to_sparse() for tensor in dense]}) as (_, restored):
        states.assert_bit_exact([tensor.to_dense() for tensor in restored["sparse"]], dense)


@pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor:UserWarning",  # torch's word on making one
    "ignore:TypedStorage is deprecated:UserWarning:torch",  # and what its own rebuilding of one uses
)
def test_quantized_tensors_come_back() -> None:
    values = torch.linspace(-3, 3, 40)
    one = torch.quantize_per_tensor(values, 0.05, 7, torch.qint8)
    by_row = torch.quantize_per_channel(
        values.view(4, 10),
        torch.tensor([0.1, 0.2, 0.3, 0.4]),
        torch.zeros(4, dtype=torch.long),
        0,
        torch.qint8,
    )
    with round_trip({"one": one, "rows": by_row}) as (_, restored):
        assert restored["one"].q_scale() == 0.05
        assert restored["one"].q_zero_point() == 7
        assert torch.equal(restored["one"].int_repr(), one.int_repr())
        assert torch.equal(restored["rows"].dequantize(), by_row.dequantize())


def test_storages_come_back_and_share_with_tensors() -> None:
    tensor = torch.arange(10)
    with round_trip({"storage": tensor.untyped_storage(), "tensor": tensor[2:4]}) as (taken, restored):
        assert taken.tensor_bytes == tensor.nbytes
        assert bytes(restored["storage"]) == states.raw_bytes(tensor)
        assert address(restored["tensor"]) == restored["storage"].data_ptr() + 2 * 8


def test_a_wrapper_subclass_comes_back_as_itself_around_tensors_of_the_arena() -> None:
    a, b = states.content("a", (4, 3), torch.float32), states.content("b", (4, 3), torch.float32)
    two = TwoTensor(a, b)  # type: ignore[no-untyped-call]
    with round_trip({"two": two, "a": a}) as (taken, restored):
        assert taken.tensor_bytes <= 2 * (a.nbytes + ALIGNMENT)
        assert type(restored["two"]) is TwoTensor
        assert states.raw_bytes(restored["two"].a) == states.raw_bytes(a)
        assert states.raw_bytes(restored["two"].b) == states.raw_bytes(b)
        assert address(restored["two"].a) == address(restored["a"])


def test_the_result_of_a_collective_comes_back_as_the_tensor_that_it_waits_for() -> None:
    inner = states.content("collective", (4,), torch.float32)
    with round_trip({"reduced": AsyncCollectiveTensor(inner)}) as (_, restored):
        states.assert_bit_exact(restored["reduced"], inner)


def test_meta_tensors_stay_without_memory() -> None:
    meta = torch.empty(1 << 40, 3, dtype=torch.bfloat16, device="meta")
    with round_trip({"meta": meta}) as (taken, restored):
        assert taken.tensor_bytes == 0
        assert restored["meta"].is_meta
        assert (restored["meta"].shape, restored["meta"].dtype) == (meta.shape, meta.dtype)


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"good": 1, "bad": threading.Lock()}, "'bad'"),
        (
            {"good": torch.ones(2), "outer": {"ok": 1, "inner": {"bad": threading.Lock()}}},
            "'outer.inner.bad'",
        ),
        ({"outer": {"items": [1, lambda: 1]}}, "'outer.items'"),
        ({"outer": {"generator": (n for n in "abc")}}, "'outer.generator'"),
    ],
    ids=["top", "nested", "in a list", "generator"],
)
def test_a_value_that_does_not_pickle_is_named_by_its_path(state: State, path: str) -> None:
    arena = Arena()
    with pytest.raises(ConfigurationError, match=f"^the value at {path} can't be pickled") as caught:
        snapshot.take(state, arena)
    assert caught.value.hint
    assert arena.fd == -1  # nothing was copied, nor memory taken for it


def test_measure_is_what_a_snapshot_takes() -> None:
    state = states.build(None, big=False)
    with round_trip(state) as (taken, _):
        offset, nbytes = taken.extents[-1]
        assert 0 <= snapshot.layout_of(state).nbytes - (offset + nbytes) < ALIGNMENT


def test_taking_another_snapshot_into_the_arena_leaves_nothing_of_the_first() -> None:
    arena = Arena()
    first = {"a": states.content("first", (100_000,), torch.float64), "gone": [1, 2]}
    second = {"b": states.content("second", (33, 3), torch.int8), "a": states.content("a", (7,), torch.int32)}
    try:
        for state in (first, second, first):
            states.assert_bit_exact(snapshot.restore(snapshot.take(state, arena), arena), state)
    finally:
        arena.close()


@dataclass(frozen=True)
class Drawn:
    """Tensors over a few storages, and the storage in which each lies."""

    tensors: list[Tensor]
    homes: list[int]


@st.composite
def collections_of_views(draw: st.DrawFn) -> Drawn:
    """Views of every kind, of storages with random content: overlapping, repeated, expanded, scattered."""
    sizes = draw(st.lists(st.integers(16, 2048), min_size=1, max_size=3))
    storages = [
        states.content(f"storage {number}", (size,), torch.uint8).untyped_storage()
        for number, size in enumerate(sizes)
    ]
    tensors: list[Tensor] = []
    homes: list[int] = []
    for _ in range(draw(st.integers(1, 8))):
        home = draw(st.integers(0, len(storages) - 1))
        dtype = draw(
            st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128])
        )
        room = sizes[home] // dtype.itemsize
        shape: list[int] = []
        stride: list[int] = []
        reach = room  # elements that the dimensions to come may spread over
        for _ in range(draw(st.integers(0, 3))):
            step = draw(st.integers(0, max(1, min(reach - 1, 9))))
            longest = 6 if step == 0 else 1 + (reach - 1) // step
            length = draw(st.integers(0, min(longest, 40)))
            shape.append(length)
            stride.append(step)
            reach -= max(0, length - 1) * step
        offset = draw(st.integers(0, room - max(1, span(shape, stride))))
        tensor = torch.empty(0, dtype=dtype).set_(storages[home], offset, shape, stride)
        if dtype.is_complex and draw(st.booleans()):
            tensor = tensor.conj()
            if draw(st.booleans()):
                tensor = tensor.imag
        tensors.append(tensor)
        homes.append(home)
    return Drawn(tensors, homes)


def is_copied_as_it_lies(tensor: Tensor) -> bool:
    return span(tensor.shape, tensor.stride()) <= 2 * tensor.numel() and not (
        tensor.is_conj() or tensor.is_neg()
    )


def stretch(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first byte and behind the last."""
    return address(tensor), address(tensor) + span(tensor.shape, tensor.stride()) * tensor.itemsize


@settings(max_examples=150, deadline=None)
@given(collections_of_views())
def test_any_collection_of_views_comes_back_with_what_it_shares_in_bounded_memory(drawn: Drawn) -> None:
    with round_trip({"views": list(drawn.tensors)}) as (taken, state):
        restored: list[Tensor] = state["views"]
        states.assert_bit_exact(restored, drawn.tensors)
        full = [number for number, tensor in enumerate(drawn.tensors) if tensor.numel()]
        lying = [number for number in full if is_copied_as_it_lies(drawn.tensors[number])]
        gathered = sum(drawn.tensors[number].nbytes for number in full if number not in lying)
        used = {drawn.homes[number] for number in lying}
        whole = sum(drawn.tensors[drawn.homes.index(home)].untyped_storage().nbytes() for home in used)
        spread = sum(2 * drawn.tensors[number].nbytes + ALIGNMENT for number in lying)
        assert taken.tensor_bytes <= gathered + min(spread, whole + ALIGNMENT * len(lying))
        for number in lying:
            for other in lying:
                (a, a_end), (b, b_end) = stretch(drawn.tensors[number]), stretch(drawn.tensors[other])
                if a < b_end and b < a_end:
                    assert address(restored[other]) - address(restored[number]) == b - a
        extents = sorted(taken.extents)
        for (offset, nbytes), (following, _) in itertools.pairwise(extents):
            assert offset + nbytes <= following


def test_distributed_tensors_plan_as_before_and_hold_the_same(rank_pool: RankPools) -> None:
    def check(rank: int) -> None:
        mesh = states.world_mesh()
        spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])
        sharded = sharded_tensor.rand(spec, 7, 3)
        state: State = {**states.build(mesh, big=False), "chunks": sharded}
        assert isinstance(state["training"]["model"]["0.weight"], DTensor)
        with round_trip(state) as (_, restored):
            before = planned(plain(state), coordinator=rank == 0)
            after = planned(restored, coordinator=rank == 0)
            assert after.items == before.items
            assert after.planner_data == before.planner_data
            again = restored.pop("chunks")
            assert type(again) is ShardedTensor
            assert again.metadata() == sharded.metadata()
            for shard, original in zip(again.local_shards(), sharded.local_shards(), strict=True):
                assert shard.metadata == original.metadata
                assert states.raw_bytes(shard.tensor) == states.raw_bytes(original.tensor)
            del state["chunks"]
            states.assert_bit_exact(restored, plain(state))

    rank_pool(2)(check)


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one."""
    memory = Path("/dev/shm")  # noqa: S108 - the folder inside it has a name of its own
    made = Path(tempfile.mkdtemp(dir=memory)) if memory.is_dir() else tmp_path
    yield made
    shutil.rmtree(made)


def test_training_may_overwrite_every_tensor_as_soon_as_the_call_returns(fast_folder: Path) -> None:
    shapes = {"a": (512, 1024), "b": (256, 1024), "c": (256, 1023), "bias": (1000,), "scalar": ()}

    def content(step: int) -> dict[str, Tensor]:
        made = {
            name: states.content(f"{name} {step % 3}", size, torch.float32) for name, size in shapes.items()
        }
        return {**made, "column": made["a"][:, 5]}

    state, resting, stop = content(0), threading.Lock(), threading.Event()

    def train() -> None:
        while not stop.wait(0.005):
            with resting:
                for tensor in state.values():
                    tensor.sub_(1.5)

    trainer = threading.Thread(target=train, name="trainer")
    trainer.start()
    try:
        with ProcessExecutor() as executor:
            for step in range(SAVES):
                folder = fast_folder / f"step-{step}"
                expected = content(step)
                with resting:
                    for name in shapes:
                        state[name].copy_(expected[name])
                    handle = executor.execute_save(
                        state, storage_writer=cloudckpt.StorageWriter(f"file://{folder}")
                    )
                handle.result(timeout=60)
                loaded = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
                dcp.load(loaded, storage_reader=cloudckpt.StorageReader(f"file://{folder}"))
                states.assert_bit_exact(loaded, expected)
                shutil.rmtree(folder)
    finally:
        stop.set()
        trainer.join()
