"""Plans are kept from save to save, and a state whose structure changes is saved right all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.tensor import Placement, Replicate, Shard

import cloudckpt
from cloudckpt.executor import ProcessExecutor
from cloudckpt.executor.worker.plan_cache import PlanCache, Prepared
from support import executors, states
from support.ranks import RankPool, RankPools

State = dict[str, Any]
Edit = Callable[[State], object]


def base() -> State:
    return {
        "weight": states.content("weight", (4, 6), torch.float32),
        "other": states.content("other", (3,), torch.int64),
        "nested": {
            "a": states.content("a", (2, 2), torch.float16),
            "b": [states.content("b", (5,), torch.int8), 7],
        },
        "step": 1,
    }


def _tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return states.content("changed", shape, dtype)


EDITS: dict[str, Edit] = {
    "another dtype of the same size": lambda state: state.update(weight=_tensor((4, 6), torch.int32)),
    "a smaller dtype": lambda state: state.update(weight=_tensor((4, 6), torch.bfloat16)),
    "another shape": lambda state: state.update(weight=_tensor((5, 6), torch.float32)),
    "another shape of as many elements": lambda state: state.update(weight=_tensor((6, 4), torch.float32)),
    "another order in memory": lambda state: state.update(weight=_tensor((6, 4), torch.float32).t()),
    "a key more": lambda state: state.update(more=_tensor((2,), torch.float32)),
    "a key less": lambda state: state.pop("other"),
    "another name": lambda state: state.update(renamed=state.pop("other")),
    "another nesting": lambda state: state.update(nested={"c": state["nested"]}),
    "a list for a mapping": lambda state: state.update(nested=[state["nested"]["a"], 5]),
    "a value for a tensor": lambda state: state.update(weight="no tensor any more"),
    "a tensor for a value": lambda state: state.update(step=_tensor((1,), torch.int64)),
    "nothing but content": lambda state: state.update(weight=state["weight"].flip(0), step=2),
}


def edited(edit: str) -> State:
    state = base()
    EDITS[edit](state)
    return state


def fingerprint(state: State) -> bytes:
    return Prepared.of(state).fingerprint


def metadata_in(uri: str) -> Metadata:
    return cloudckpt.StorageReader(uri).read_metadata()


def assert_holds(uri: str, expected: Callable[[], State]) -> None:
    """The checkpoint loads into a state of this structure with this content, and describes it so."""
    state = expected()
    loaded: State = states.erase(expected())
    dcp.load(loaded, storage_reader=cloudckpt.StorageReader(uri))
    states.assert_bit_exact(loaded, state)


@pytest.fixture(scope="module")
def executor() -> Iterator[ProcessExecutor]:
    with ProcessExecutor() as made:
        yield made


def save(executor: ProcessExecutor, state: State, uri: str) -> None:
    executor.execute_save(state, storage_writer=cloudckpt.StorageWriter(uri)).result(timeout=60)


@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_structure_is_saved_right_and_so_is_the_one_before_again(
    executor: ProcessExecutor, tmp_path: Path, edit: str
) -> None:
    turns: list[Callable[[], State]] = [base, base, lambda: edited(edit), lambda: edited(edit), base]
    for turn, make in enumerate(turns):
        uri = f"file://{tmp_path}/{turn}"
        save(executor, make(), uri)
        assert_holds(uri, make)
        stock = dcp.save(make(), storage_writer=cloudckpt.StorageWriter(f"file://{tmp_path}/stock-{turn}"))
        saved = metadata_in(uri)
        assert saved.state_dict_metadata == stock.state_dict_metadata
        assert saved.planner_data == stock.planner_data
    assert executor.generation == 1  # one process, with all that it keeps, saved them all


def test_every_edit_but_one_of_content_changes_the_fingerprint() -> None:
    prints = {edit: fingerprint(edited(edit)) for edit in EDITS}
    assert prints.pop("nothing but content") == fingerprint(base())
    assert len({*prints.values(), fingerprint(base())}) == len(prints) + 1


def test_a_tensor_of_another_class_changes_the_fingerprint() -> None:
    tensor = torch.ones(3)
    assert fingerprint({"x": tensor}) != fingerprint({"x": nn.Parameter(tensor)})


def test_only_the_plans_of_the_last_structure_are_kept() -> None:
    writer = cloudckpt.StorageWriter("file:///nowhere")
    cache = PlanCache()
    kept = SavePlanner._cached_save_plan
    before = dict(kept)

    def plan(state: State) -> bool:
        """Plan a save on one rank; say whether the plan that was kept is used."""
        planner = cache.planner_for(writer, [fingerprint(state)], Prepared.of(state))
        planner.set_up_planner(state, is_coordinator=True)
        local = planner.create_local_plan()
        (central,), _ = planner.create_global_plan([local])
        assert planner.finish_plan(central).items
        return not local.usable

    assert not plan(base())
    assert plan(base())
    assert not plan(edited("a smaller dtype"))
    assert not plan(base())
    assert len(kept) == len(before) + 1
    cache.forget()
    assert kept == before
    assert not plan(base())
    cache.forget()


@pytest.fixture(scope="module")
def pool(rank_pool: RankPools) -> Iterator[RankPool]:
    pool = rank_pool(2)
    yield pool
    pool(lambda _rank: executors.end("plans"))


def save_on_ranks(make: Callable[[int], State], uri: str) -> Callable[[int], int | None]:
    """A function for a pool: save what ``make`` gives on each rank, load it there and compare."""

    def run(rank: int) -> int | None:
        executor = executors.living("plans", start_timeout=60.0)
        save(executor, make(rank), uri)
        dist.barrier()
        assert_holds(uri, lambda: make(rank))
        return executor.generation

    return run


def two_rank_state(rank: int) -> State:
    mesh = states.world_mesh()
    return {
        "sharded": states.distributed("sharded", (8, 4), torch.float32, mesh, Shard(0)),
        "own": {str(rank): states.content(f"own {rank}", (4, 6), torch.float32)},
        "same": states.content("same", (10,), torch.float32),
    }


@pytest.mark.parametrize("edit", ["dtype", "shape", "more", "less", "value"])
@pytest.mark.parametrize("changed", [0, 1], ids="on rank {}".format)
def test_a_structure_that_changes_on_one_rank_alone_is_saved_right(
    pool: RankPool, tmp_path: Path, changed: int, edit: str
) -> None:
    def edited(rank: int) -> State:
        state = two_rank_state(rank)
        own = state["own"]
        if rank == changed:
            match edit:
                case "dtype":
                    own[str(rank)] = states.content("new", (4, 6), torch.bfloat16)
                case "shape":
                    own[str(rank)] = states.content("new", (2, 6), torch.float32)
                case "more":
                    own[f"{rank} more"] = states.content("new", (3,), torch.int16)
                case "less":
                    own.clear()
                case _:
                    own[str(rank)] = "a value"
        return state

    for turn, make in enumerate((two_rank_state, two_rank_state, edited, edited, two_rank_state)):
        uri = f"file://{tmp_path}/{turn}"
        assert len(set(pool(save_on_ranks(make, uri)))) == 1
        if edit == "dtype" and make is edited:
            entry: Any = metadata_in(uri).state_dict_metadata[f"own.{changed}"]
            assert entry.properties.dtype is torch.bfloat16


def test_placements_that_change_at_the_same_global_shape_are_saved_right(
    pool: RankPool, tmp_path: Path
) -> None:
    def placed(placement: Placement) -> Callable[[int], State]:
        return lambda _rank: {
            "x": states.distributed("x", (4, 4), torch.float32, states.world_mesh(), placement),
            "y": states.distributed("y", (4, 4), torch.float32, states.world_mesh(), Shard(0)),
        }

    chunks = []
    for turn, placement in enumerate((Shard(0), Shard(0), Replicate(), Replicate(), Shard(1), Shard(0))):
        uri = f"file://{tmp_path}/{turn}"
        pool(save_on_ranks(placed(placement), uri))
        entry: Any = metadata_in(uri).state_dict_metadata["x"]
        chunks.append(sorted(tuple(chunk.sizes) for chunk in entry.chunks))
    rows, whole, columns = [(2, 4)] * 2, [(4, 4)], [(4, 2)] * 2
    assert chunks == [rows, rows, whole, whole, columns, rows]
