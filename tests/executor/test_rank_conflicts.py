"""Values that differ between ranks under one name are found in the save that would lose them."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from cloudckpt import Checkpointer, ConfigurationError
from cloudckpt.executor import ProcessExecutor
from cloudckpt.executor.coordination import remote_errors
from cloudckpt.executor.worker.digests import value_digest
from cloudckpt.executor.worker.rank_conflicts import RankCheck, RankConflicts, checked, judged
from support.living import end, living
from support.ranks import RankPool, RankPools

RANKS = 2
LARGE = 1 << 20
"""Elements: far more than are read of a tensor that is sampled."""


@pytest.fixture
def pool(rank_pool: RankPools) -> Iterator[RankPool]:
    pool = rank_pool(RANKS)
    yield pool
    pool(end)


def compare(check: RankCheck, leaves: dict[str, Any], policy: RankConflicts = "error", **more: Any) -> str:
    """Have this rank's leaves compared as in a save, and return what is wrong with them."""
    summary = check.summary(leaves, policy, **more)
    every: list[Any] = [None] * check.world_size
    dist.all_gather_object(every, summary)
    try:
        check.settle(every, leaves, policy, **more)
    except CheckpointException as error:
        return str(error.failures[0][0])
    return ""


def new_check(rank: int) -> RankCheck:
    return RankCheck(rank, dist.get_world_size())


@pytest.mark.parametrize(
    "differing",
    [
        pytest.param(lambda rank: 10 * rank, id="int"),
        pytest.param(lambda rank: torch.full((3,), float(rank)), id="tensor"),
        pytest.param(
            lambda rank: torch.arange(LARGE) + rank * (torch.arange(LARGE) == LARGE // 3), id="large"
        ),
        pytest.param(lambda rank: torch.zeros(2, dtype=(torch.float32, torch.int32)[rank]), id="dtype"),
        pytest.param(lambda rank: torch.zeros(2 + rank), id="shape"),
        pytest.param(lambda rank: np.arange(3) + rank, id="numpy"),
        pytest.param(lambda rank: ("text", {"at": {rank}}), id="nested"),
        pytest.param(lambda rank: torch.eye(3).to_sparse() * (rank + 1), id="sparse"),
        pytest.param(lambda rank: 1 if rank else True, id="type"),
    ],
)
@pytest.mark.parametrize("structure", ["alike", "of stages"])
def test_a_difference_is_named_on_every_rank_with_the_cure(
    pool: RankPool, differing: Any, structure: str
) -> None:
    def on_rank(rank: int) -> str:
        own = {f"stage.{rank}": torch.ones(2)} if structure == "of stages" else {}
        leaves = {"same": torch.arange(4), "differs": differing(rank), **own}
        return compare(new_check(rank), leaves)

    first, second = pool(on_rank)
    assert first == second
    assert "different values under the same name 'differs': rank 1 differs from rank 0" in first
    assert "cloudckpt.PerRank" in first and "rank_conflicts=[...]" in first


def test_equal_states_are_never_refused_save_after_save(pool: RankPool) -> None:
    def on_rank(rank: int) -> list[str]:
        told = []
        for own in ({}, {f"stage.{rank}": torch.ones(2)}):
            check = new_check(rank)
            for save in range(4):
                text = f"{save} of a run"  # another object on each rank
                told.append(
                    compare(
                        check,
                        {
                            "weight": torch.full((LARGE,), float(save)),
                            "strided": torch.arange(LARGE).view(1024, -1).t() + save,
                            "empty": torch.empty(0),
                            "scalar": torch.tensor(save),
                            "half": torch.ones(5, dtype=torch.bfloat16),
                            "complex": torch.ones(5, dtype=torch.complex64).conj(),
                            "values": (text, text if rank else f"{save} of a run", {"b", "a", "c"}),
                            "when": dt.timedelta(save),
                            "array": np.arange(9).reshape(3, 3).T,
                            **own,
                        },
                    )
                )
        return told

    assert set(itertools.chain(*pool(on_rank))) == {""}


@pytest.mark.parametrize("structure", ["alike", "of stages"])
def test_what_becomes_different_later_is_found_then(pool: RankPool, structure: str) -> None:
    def on_rank(rank: int) -> list[bool]:
        check, told = new_check(rank), list[str]()
        own = {f"stage.{rank}": 1} if structure == "of stages" else {}
        for drift in (0, 0, 1, 0, 0):
            leaves = {"small": torch.zeros(9), "large": torch.zeros(LARGE) + drift * rank, **own}
            told.append(compare(check, leaves))
        return ["large" in one for one in told]

    assert pool(on_rank) == [[False, False, True, False, False]] * RANKS


def test_the_good_case_takes_no_exchange_of_its_own(pool: RankPool) -> None:
    def on_rank(rank: int) -> int:
        check, counted = new_check(rank), 0
        own = {f"stage.{rank}": 1}
        compare(check, {"same": 1, **own})

        class Counted(RankCheck):
            __slots__ = ()

            def _compared(self, leaves: Any, policy: Any, left_out: Any) -> Any:
                nonlocal counted
                counted += 1
                raise AssertionError

        check.__class__ = Counted
        for save in range(3):
            assert not compare(check, {"same": save, **own})
        return counted

    assert pool(on_rank) == [0, 0]


def test_names_that_may_differ_do_and_others_may_not(pool: RankPool) -> None:
    def on_rank(rank: int) -> Any:
        check = new_check(rank)
        policy = ("expert.*", "rng")
        mine = {"expert.1.weight": torch.full((3,), float(rank)), "rng": rank, "same": 1}
        told = [compare(check, mine, policy), compare(check, mine, policy)]
        lowest = sorted(check.lowest)
        alike = new_check(rank)
        for drift in (0, 0, rank):  # alike at first
            assert not compare(alike, {"rng": drift, f"stage.{rank}": 1}, policy)
        assert alike.lowest == {"rng"}
        return [*told, lowest, compare(check, {**mine, "same": rank}, policy)]

    for first, second, lowest, third in pool(on_rank):
        assert first == second == ""
        assert lowest == ["expert.1.weight", "rng"]
        assert "'same'" in third and "rng" not in third


@pytest.mark.parametrize("policy", ["error", "warn", ("*",)])
@pytest.mark.parametrize("other", [7, torch.ones(2, 2), "a shard"])
def test_kinds_that_differ_are_refused_whatever_may_differ(
    pool: RankPool, policy: RankConflicts, other: Any
) -> None:
    def on_rank(rank: int) -> str:
        value = other if rank else torch.ones(2)
        if rank and isinstance(other, str):
            value = DTensor.from_local(torch.ones(2), DeviceMesh("cpu", [1]), [Shard(0)], run_check=False)
        elif isinstance(other, str):
            DeviceMesh("cpu", [1])
        return compare(new_check(rank), {"it": value}, policy)

    for told in pool(on_rank):
        assert "values of different kinds under the same name 'it': rank 1 differs from rank 0" in told


def test_names_that_are_left_out_may_differ(pool: RankPool) -> None:
    def on_rank(rank: int) -> list[str]:
        check = new_check(rank)
        return [compare(check, {"mean": rank, "same": 1}, left_out={"mean"}) for _ in range(2)]

    assert pool(on_rank) == [["", ""], ["", ""]]


def test_shards_differ_and_replicas_may_not(pool: RankPool) -> None:
    def on_rank(rank: int) -> list[str]:
        mesh = DeviceMesh("cpu", torch.arange(RANKS))
        local = torch.arange(4.0) + rank
        sharded = DTensor.from_local(local, mesh, [Shard(0)])
        replicated = DTensor.from_local(local, mesh, [Replicate()], run_check=False)
        alike = DTensor.from_local(torch.ones(3), mesh, [Replicate()], run_check=False)
        return [
            compare(new_check(rank), {"sharded": sharded, "alike": alike}),
            compare(new_check(rank), {"sharded": sharded, "replicated": replicated}),
        ]

    for good, bad in pool(on_rank):
        assert not good
        assert "'replicated': rank 1 differs from rank 0" in bad


def test_shards_of_meshes_of_some_ranks_are_replicas_of_each_other(pool: RankPool) -> None:
    def on_rank(rank: int) -> list[str]:
        meshes = [DeviceMesh("cpu", [one]) for one in range(RANKS)]
        shard = DTensor.from_local(torch.ones(4) * rank, meshes[rank], [Shard(0)], run_check=False)
        return [compare(new_check(rank), {"expert": shard})]

    for (told,) in pool(on_rank):
        assert "'expert': rank 1 differs from rank 0" in told


def test_thousands_of_ranks_and_names_make_a_short_message() -> None:
    digests: list[dict[Any, bytes]] = [
        {(f"layer.{name}", None): bytes([name % 2 and rank % 2]) for name in range(40)}
        for rank in range(4000)
    ]
    record = judged(digests, "error")[0].failure
    assert record is not None
    failure = remote_errors.loads(record)
    assert len(str(failure)) < 700
    assert "'layer.9' and 15 more: rank 1, 3, 5, 7, 9, 11, 13, 15, … differs from rank 0" in str(failure)


@dataclasses.dataclass
class Place:
    at: int
    inside: Any = None


def test_equal_values_have_equal_digests_whatever_they_share() -> None:
    def values(shared: bool) -> list[Any]:
        name, tensor = str(12), torch.ones(3)
        other, copy = (name, tensor) if shared else (str(12), torch.ones(3))
        return [
            [name, other], (tensor, copy), {"k": name, "l": other}, Place(1, [name, other]),
            collections.OrderedDict(a=name, b=other), collections.deque([name, other], 3),
            np.array([name, other], dtype=object), {name, 1, 2.5, None}, frozenset({name}), np.float64(2),
            collections.Counter([name, other]), dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        ]  # fmt: skip

    for one, other in zip(values(True), values(False), strict=True):
        assert value_digest(one) == value_digest(other), one
    digests = {value_digest(one) for one in values(True)}
    assert len(digests) == len(values(True))
    cycle: list[Any] = [Place(1)]
    cycle.append(cycle)
    assert value_digest(cycle) != value_digest([Place(1), []])


@pytest.mark.parametrize("given", ["none", None, 1, [1], "*.rng", b"error", {"a"}])
def test_no_policy_is_refused_when_the_checkpointer_is_made(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="rank_conflicts is"):
        Checkpointer(f"file://{tmp_path}/run", rank_conflicts=given, preemption_grace=None)
    assert checked(["a*"]) == ("a*",) and checked("warn") == "warn"


def of_rank(rank: int) -> dict[str, Any]:
    return {
        "same": torch.arange(5.0),
        **({} if rank else {"first": torch.ones(5000)}),  # so that DCP has the other rank write the rest
        "expert": {"weight": torch.full((9,), 1.0 + rank), "name": f"expert {rank}"},
    }


def test_a_checkpointer_refuses_by_name_and_goes_on(pool: RankPool, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/run"

    def on_rank(rank: int) -> list[str]:
        checkpointer, told = living(uri, on_failure="warn"), []
        for step, state in enumerate([of_rank(0), of_rank(rank), of_rank(0), of_rank(0)]):
            error = checkpointer.async_save(step, state).exception()
            assert error is None or isinstance(error, ConfigurationError)
            told.append("" if error is None else str(error))
        assert checkpointer.all_steps() == [0, 2, 3]
        return told

    first, second = pool(on_rank)
    assert first == second
    assert [bool(one) for one in first] == [False, True, False, False]
    assert "'expert.weight', 'expert.name': rank 1" in first[1]


@pytest.mark.parametrize("policy", ["warn", ["expert.*"]])
def test_the_lowest_ranks_value_is_saved_where_names_may_differ(
    pool: RankPool, tmp_path: Path, policy: Any
) -> None:
    uri = f"file://{tmp_path}/run"

    def on_rank(rank: int) -> Any:
        checkpointer = living(uri, rank_conflicts=policy)
        for step in range(3):
            checkpointer.save(step, of_rank(rank))
            loaded: dict[str, Any] = of_rank(0) | {"expert": {"weight": torch.zeros(9), "name": ""}}
            checkpointer.load(loaded, step)
            assert loaded["expert"]["weight"].tolist() == [1.0] * 9
            assert loaded["expert"]["name"] == "expert 0"

    pool(on_rank)


def test_ranks_saving_by_an_executor_of_their_own_are_not_compared(pool: RankPool, tmp_path: Path) -> None:
    def on_rank(rank: int) -> None:
        with ProcessExecutor() as executor:
            executor.execute_save({"own": rank}, checkpoint_id=f"file://{tmp_path}/step").result()

    pool(on_rank)
