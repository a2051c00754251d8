"""Shards are saved where the plan says, on every kind of distributed tensor, or refused by the save."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardMetadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import cloudckpt
from cloudckpt.backends.state import placements
from cloudckpt.backends.state.placements import ShardAttributes, shard_attributes
from cloudckpt.backends.state.tensors import refusal
from cloudckpt.executor import ProcessExecutor
from cloudckpt.executor.worker.plan_cache import Prepared
from support.ranks import RankPools
from support.snapshots import round_trip

State = dict[str, Any]

FULL = torch.arange(24.0).view(6, 4)

needs_protocol = pytest.mark.skipif(
    not placements.PLANNED, reason="torch before 2.14 has no CheckpointableTensor"
)


def part_of(whole: Tensor, boxes: list[tuple[int, int]], *, padding: int = 1, filled: bool = True) -> Tensor:
    """Return a local tensor with rows of the whole, each stretch behind some padding, and its attributes."""
    rows = sum(stop - start + padding for start, stop in boxes)
    local = torch.full((rows, whole.shape[1]), -1.0)
    at, within = 0, []
    for start, stop in boxes:
        at += padding
        within.append((at, 0))
        if filled:
            local[at : at + stop - start] = whole[start:stop]
        at += stop - start
    ShardAttributes(
        tuple(whole.shape),
        tuple((start, 0) for start, _ in boxes),
        tuple(within),
        tuple((stop - start, whole.shape[1]) for start, stop in boxes),
    ).put_on(local)
    return local


def holds(local: Tensor, whole: Tensor) -> bool:
    """Return True if each shard has its rows of the whole and the padding is as it was."""
    expected = torch.full_like(local, -1.0)
    shards = shard_attributes(local)
    assert shards is not None
    for (start, _), (within, _), (rows, _) in zip(*shards[1:], strict=True):
        expected[within : within + rows] = whole[start : start + rows]
    return torch.equal(local, expected)


SAVED: dict[int, list[list[tuple[int, int]]]] = {
    1: [[(0, 2), (2, 6)]],
    2: [[(0, 1), (4, 6)], [(1, 4)]],
    3: [[(3, 6)], [], [(0, 3)]],
}
"""Rows by rank, for so many ranks: several shards, out of order, or none."""


@needs_protocol
@pytest.mark.parametrize("ranks", SAVED)
@pytest.mark.parametrize("writer", ["writer", "executor", "checkpointer", "stock"])
def test_the_shards_of_a_checkpointable_tensor_are_saved_and_loaded(
    rank_pool: RankPools, tmp_path: Path, ranks: int, writer: str
) -> None:
    def save(rank: int) -> None:
        state: State = {"w": part_of(FULL, SAVED[ranks][rank]), "step": 3}
        if writer == "stock":
            dcp.save(state, checkpoint_id=tmp_path / "c")
        elif writer == "writer":
            dcp.save(state, storage_writer=cloudckpt.StorageWriter(tmp_path / "c"))
        elif writer == "executor":
            with ProcessExecutor() as executor:
                target = cloudckpt.StorageWriter(tmp_path / "c")
                executor.execute_save(state, storage_writer=target).result(timeout=100)
        else:
            with cloudckpt.Checkpointer(tmp_path, progress=False) as checkpointer:
                checkpointer.save(0, state)
                other: State = {"w": part_of(FULL, SAVED[ranks][-1 - rank], filled=False), "step": 0}
                checkpointer.load(other, 0)
                assert holds(other["w"], FULL)

    rank_pool(ranks)(save)
    folder = tmp_path / ("step-0000000000" if writer == "checkpointer" else "c")

    def load(rank: int) -> None:
        for ours in (True, False):
            there: State = {"storage_reader": cloudckpt.StorageReader(folder)} if ours else {}
            where = there or {"checkpoint_id": folder}
            resharded = {"w": part_of(FULL, SAVED[2][rank], padding=2, filled=False)}
            dcp.load(resharded, **where)
            assert holds(resharded["w"], FULL)
            whole = {"w": torch.zeros(6, 4)}
            dcp.load(whole, **where)
            assert torch.equal(whole["w"], FULL)

    rank_pool(2)(load)


@needs_protocol
def test_a_plan_that_was_kept_is_not_used_for_other_shards(rank_pool: RankPools, tmp_path: Path) -> None:
    def save(rank: int) -> None:
        with ProcessExecutor() as executor:
            for step in range(3):
                rows = [(3, 6), (0, 3)][(rank + step) % 2]
                state = {"w": part_of(FULL + step, [rows])}
                writer = cloudckpt.StorageWriter(tmp_path / str(step))
                executor.execute_save(state, storage_writer=writer).result(timeout=100)

    rank_pool(2)(save)
    for step in range(3):
        whole = {"w": torch.zeros(6, 4)}
        dcp.load(whole, storage_reader=cloudckpt.StorageReader(tmp_path / str(step)))
        assert torch.equal(whole["w"], FULL + step)


@needs_protocol
@pytest.mark.parametrize("kind", ["parameter", "scalar"])
def test_a_checkpointable_tensor_may_be_a_parameter_or_a_scalar(tmp_path: Path, kind: str) -> None:
    tensor = nn.Parameter(FULL.clone()) if kind == "parameter" else torch.tensor(3.0)
    whole = tuple(tensor.shape)
    ShardAttributes(whole, ((0,) * len(whole),), ((0,) * len(whole),), (whole,)).put_on(tensor)
    assert refusal(tensor) is None
    with ProcessExecutor() as executor:
        writer = cloudckpt.StorageWriter(tmp_path)
        executor.execute_save({"w": tensor}, storage_writer=writer).result(timeout=100)
    state = {"w": torch.zeros(whole)}
    dcp.load(state, storage_reader=cloudckpt.StorageReader(tmp_path))
    assert torch.equal(state["w"], tensor)


@pytest.mark.skipif(placements.PLANNED, reason="torch 2.14 plans by them")
def test_before_torch_2_14_a_checkpointable_tensor_is_refused(tmp_path: Path) -> None:
    state = {"model": {"w": part_of(FULL, [(0, 6)])}}
    refused = refusal(state["model"]["w"])
    assert refused is not None
    assert "2.14" in refused.hint
    with pytest.raises(CheckpointException, match=r"'model\.w'"):
        dcp.save(state, storage_writer=cloudckpt.StorageWriter(tmp_path / "c"))
    with (
        ProcessExecutor() as executor,
        pytest.raises(cloudckpt.ConfigurationError, match=r"'model\.w' has the attributes"),
    ):
        executor.execute_save(state, storage_writer=cloudckpt.StorageWriter(tmp_path / "c")).result()
    assert not list(tmp_path.iterdir())


def fingerprint(state: State) -> bytes:
    return Prepared.of(state).fingerprint


@pytest.mark.parametrize("name", placements.SHARD_ATTRIBUTES)
def test_each_shard_attribute_changes_the_fingerprint(name: str) -> None:
    def state(**changed: Any) -> State:
        local = part_of(FULL, [(0, 2), (2, 6)])
        for key, value in changed.items():
            setattr(local, key, value)
        return {"w": local}

    assert fingerprint(state()) == fingerprint(state())
    assert fingerprint(state(**{name: ((5, 5), (5, 5))})) != fingerprint(state())
    plain = {"w": torch.zeros(8, 4)}
    assert fingerprint(state()) != fingerprint(plain)


@needs_protocol
def test_a_snapshot_keeps_the_shard_attributes() -> None:
    local = part_of(FULL, [(0, 2), (2, 6)])
    parameter = nn.Parameter(local.clone())
    attributes = shard_attributes(local)
    assert attributes is not None
    attributes.put_on(parameter)
    with round_trip({"w": local, "p": parameter, "plain": local.clone()}) as (_, restored):
        assert shard_attributes(restored["w"]) == attributes
        assert shard_attributes(restored["p"]) == attributes
        assert isinstance(restored["p"], nn.Parameter)
        assert shard_attributes(restored["plain"]) is None


BAD: dict[str, State] = {
    "outside the whole": {"global_offsets": ((5, 0),)},
    "outside the tensor": {"local_offsets": ((6, 0),)},
    "negative": {"local_offsets": ((-1, 0),)},
    "more of one": {"local_sizes": ((2, 4), (2, 4))},
    "dimensions": {"global_shape": (6, 4, 1)},
    "no numbers": {"global_offsets": None},
}


@needs_protocol
@pytest.mark.parametrize("kind", BAD)
def test_shard_attributes_that_contradict_the_tensor_are_refused(kind: str) -> None:
    local = part_of(FULL, [(0, 2)])
    for name, value in BAD[kind].items():
        setattr(local, name, value)
    refused = refusal(local)
    assert refused is not None
    assert "shard" in refused.reason
    assert "global_offsets" in refused.hint


def save_snapshot(state: State, folder: Path) -> None:
    """Save what a checkpoint process would have, from the processes that are here."""
    with round_trip(state) as (_, restored):
        dcp.save(restored, storage_writer=cloudckpt.StorageWriter(folder))


def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape)


def test_dtensors_that_contradict_their_plan_are_refused(rank_pool: RankPools) -> None:
    def check(rank: int) -> None:
        mesh = mesh_of(2)
        partial = DTensor.from_local(FULL.clone(), mesh, [Partial()])
        grown = DTensor.from_local(torch.zeros(4, 4), mesh, [Shard(0)])
        grown._local_tensor = torch.zeros(5, 4)
        both = DTensor.from_local(torch.zeros(4, 4), mesh, [Shard(0)])
        ShardAttributes((8, 4), ((0, 0),), ((0, 0),), ((4, 4),)).put_on(both)
        empty = distribute_tensor(torch.zeros(8, 4), mesh, [Shard(0)])
        empty._local_tensor = torch.zeros(4, 4, device="meta")
        for tensor, reason, cure in (
            (partial, "Partial", "full_tensor"),
            (grown, r"(5, 4)", "distribute_tensor"),
            (both, "CheckpointableTensor", "Leave"),
            (empty, "meta", "Materialise"),
        ):
            refused = refusal(tensor)
            assert refused is not None
            assert reason in refused.reason
            assert cure in refused.hint
            with (
                pytest.raises(cloudckpt.ConfigurationError, match=r"the value at 'model\.x' "),
                round_trip({"model": {"x": tensor}}),
            ):
                pass

    rank_pool(2)(check)


def test_uneven_empty_and_strided_shards_are_saved_where_they_are_blocks(
    rank_pool: RankPools, tmp_path: Path
) -> None:
    def check(rank: int) -> None:
        mesh, square = mesh_of(4), mesh_of(2, 2)
        state: State = {
            "uneven": distribute_tensor(FULL.clone(), mesh, [Shard(0)]),
            "empty": distribute_tensor(FULL[:2].clone(), mesh, [Shard(0)]),
            "nothing": distribute_tensor(FULL[:0].clone(), mesh, [Shard(0)]),
            "columns": distribute_tensor(FULL.clone(), square, [Shard(1), Shard(0)]),
            "twice": distribute_tensor(FULL.clone(), square, [Shard(0), Shard(0)]),
            # As FSDP2 places what tensor parallelism has sharded by the same dimension.
            "strided": strided(torch.arange(16.0).view(8, 2), square),
        }
        assert {name: refusal(tensor) for name, tensor in state.items()} == dict.fromkeys(state)
        odd = strided(FULL.clone(), square, split=3)
        refused = refusal(odd)
        if (square.get_coordinate() or [0, 0])[1] == 0:  # rows 0 and 2, or 1 and 3: the others have one row
            assert refused is not None
            assert "block" in refused.reason
        else:
            assert refused is None
        save_snapshot(state, tmp_path / "c")

    def strided(whole: Tensor, mesh: DeviceMesh, split: int = 2) -> DTensor:
        first, second = mesh.get_coordinate() or (0, 0)
        placed = (_StridedShard(0, split_factor=split), Shard(0))
        rows = [piece.chunk(2)[first] for piece in whole.chunk(split)]
        local = torch.cat(rows).chunk(2)[second].clone()
        return DTensor.from_local(local, mesh, placed, shape=whole.shape, stride=whole.stride())

    rank_pool(4)(check)
    wholes: State = {
        "uneven": FULL,
        "empty": FULL[:2],
        "nothing": FULL[:0],
        "columns": FULL,
        "twice": FULL,
        "strided": torch.arange(16.0).view(8, 2),
    }
    read = {name: torch.full_like(whole, -1.0) for name, whole in wholes.items()}
    dcp.load(read, storage_reader=cloudckpt.StorageReader(tmp_path / "c"))
    for name, whole in wholes.items():
        assert torch.equal(read[name], whole), name


def test_a_rank_outside_the_mesh_saves_and_loads_nothing_of_it(rank_pool: RankPools, tmp_path: Path) -> None:
    def check(rank: int) -> None:
        mesh = DeviceMesh("cpu", torch.tensor([0, 2]))
        whole = FULL if mesh.get_coordinate() is not None else torch.zeros(0)
        if mesh.get_coordinate() is None:
            spec = DTensor.from_local(torch.zeros(0), mesh, [Shard(0)], shape=FULL.shape, stride=(4, 1))
            tensor = spec
        else:
            row = 0 if rank == 0 else 3
            tensor = DTensor.from_local(whole[row : row + 3].clone(), mesh, [Shard(0)])
        assert refusal(tensor) is None
        save_snapshot({"w": tensor}, tmp_path / "c")
        read = {"w": torch.zeros(6, 4)}
        dcp.load(read, storage_reader=cloudckpt.StorageReader(tmp_path / "c"))
        assert torch.equal(read["w"], FULL)

    rank_pool(3)(check)


def sharded(rank: int, rows: list[tuple[int, int]], *, extra: int = 0) -> ShardedTensor:
    shards = [
        LocalShard(
            torch.cat([FULL[start:stop], torch.zeros(extra, 4)]),
            ShardMetadata([start, 0], [stop - start + extra, 4], f"rank:{rank}/cpu"),
        )
        for start, stop in rows
    ]
    return sharded_tensor.init_from_local_shards(shards, 6, 4)


def test_sharded_tensors_with_several_shards_or_none_are_saved(rank_pool: RankPools, tmp_path: Path) -> None:
    def check(rank: int) -> None:
        warnings.simplefilter("ignore")
        tensor = sharded(rank, SAVED[3][rank] if rank else [(3, 4), (4, 6)])
        assert refusal(tensor) is None
        save_snapshot({"w": tensor}, tmp_path / "c")
        blank = sharded(rank, SAVED[3][rank] if rank else [(3, 4), (4, 6)])
        for shard in blank.local_shards():
            shard.tensor.zero_()
        dcp.load({"w": blank}, storage_reader=cloudckpt.StorageReader(tmp_path / "c"))
        for shard in blank.local_shards():
            start, (rows, _) = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes
            assert torch.equal(shard.tensor, FULL[start : start + rows])
        if tensor.local_shards():
            tensor.local_shards()[0].tensor = torch.zeros(1, 4)
            refused = refusal(tensor)
            assert (refused is None) == (tensor.local_shards()[0].metadata.shard_sizes == [1, 4])

    rank_pool(3)(check)


class Small(nn.Module):
    """Fewer elements than ranks in one layer."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.large = nn.Linear(3, 5)
        self.small = nn.Linear(1, 1, bias=False)
        for parameter in self.parameters():
            nn.init.constant_(parameter, value)


KINDS = ("sharded tensors", "original parameters", "offloaded", "DTensors")


def small_model(value: float, kind: str) -> FullyShardedDataParallel:
    """Return a model of which one layer has fewer rows than there are ranks."""
    options: State = {
        "device_id": torch.device("cpu"),
        "use_orig_params": kind == "original parameters",
        "device_mesh": mesh_of(dist.get_world_size()) if kind == "DTensors" else None,
    }
    inner = Small(value)
    inner.small = FullyShardedDataParallel(inner.small, **options)  # type: ignore[assignment]
    model = FullyShardedDataParallel(inner, **options)
    if kind != "DTensors":
        config = ShardedStateDictConfig(offload_to_cpu=kind == "offloaded")
        FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT, config)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_of_fsdp1_without_a_row_saves_and_loads_nothing_of_it(
    rank_pool: RankPools, tmp_path: Path, kind: str
) -> None:
    def described(model: FullyShardedDataParallel) -> State:
        return get_model_state_dict(model) if kind == "DTensors" else model.state_dict()

    def check(rank: int) -> None:
        warnings.simplefilter("ignore")
        state = described(small_model(2.0, kind))
        small = state["small.weight"]
        if kind == "DTensors":
            assert isinstance(small, DTensor)
            assert small._local_tensor.numel() == (1 if rank == 0 else 0)
        else:
            assert isinstance(small, ShardedTensor)
            assert len(small.local_shards()) == (1 if rank == 0 else 0)
        assert [refusal(tensor) for tensor in state.values()] == [None] * len(state)
        save_snapshot({"model": state}, tmp_path / "snapshot")
        dcp.save({"model": state}, storage_writer=cloudckpt.StorageWriter(tmp_path / "writer"))
        if kind == KINDS[0]:
            with ProcessExecutor() as executor:
                for name in ("executor", "again"):
                    writer = cloudckpt.StorageWriter(tmp_path / name)
                    executor.execute_save({"model": state}, storage_writer=writer).result(timeout=100)
        for folder in sorted(tmp_path.iterdir()):
            other = small_model(7.0, kind)
            into = {"model": described(other)}
            dcp.load(into, storage_reader=cloudckpt.StorageReader(folder))
            if kind == "DTensors":
                set_model_state_dict(other, into["model"])
            else:
                other.load_state_dict(into["model"])
            with FullyShardedDataParallel.summon_full_params(other):
                for parameter in other.parameters():
                    assert bool((parameter == 2.0).all())
        dist.barrier()

    rank_pool(3)(check)


def test_replicated_dtensors_are_not_refused(rank_pool: RankPools) -> None:
    def check(_: int) -> None:
        assert refusal(distribute_tensor(FULL.clone(), mesh_of(2), [Replicate()])) is None

    rank_pool(2)(check)
