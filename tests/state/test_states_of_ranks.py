"""Jobs of several ranks resume as if undisturbed, and what ranks have of their own is kept or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support import rank_states
from support.ranks import RankPools


@pytest.mark.parametrize("point", [0, 3])
@pytest.mark.parametrize("kind", rank_states.KINDS)
def test_a_resumed_job_equals_an_undisturbed_one(
    rank_pool: RankPools, tmp_path: Path, kind: str, point: int
) -> None:
    for whole, going_on, again in rank_pool(2)(rank_states.resumed, f"{tmp_path}/run", kind, point):
        assert going_on == whole
        assert again == whole


@pytest.mark.parametrize("kind", ["FSDP1", "FSDP1, flat", "FSDP2"])
def test_ranks_without_a_shard_resume_as_well(rank_pool: RankPools, tmp_path: Path, kind: str) -> None:
    for whole, going_on, again in rank_pool(3)(rank_states.resumed, f"{tmp_path}/run", kind, 2):
        assert going_on == whole
        assert again == whole


def test_each_rank_gets_its_own_value_back(rank_pool: RankPools, tmp_path: Path) -> None:
    uri = f"{tmp_path}/run"
    rank_pool(2)(rank_states.save_own, uri)

    loaded = rank_pool(2)(rank_states.load_own, uri, "error")

    assert [one[:2] for one in loaded] == [(0, [0]), (10, [1, 1])]
    for rank, (_, _, number) in enumerate(loaded):
        torch.manual_seed(rank)
        assert number == torch.rand(1).item()


def test_another_number_of_ranks_does_as_it_is_told(rank_pool: RankPools, tmp_path: Path) -> None:
    uri = f"{tmp_path}/run"
    rank_pool(2)(rank_states.save_own, uri)

    with pytest.raises(Exception, match="'place' has a value for each of 2 ranks, and 3 load it"):
        rank_pool(3)(rank_states.load_own, uri, "error")
    first = rank_pool(3)(rank_states.load_own, uri, "first")
    dropped = rank_pool(3)(rank_states.load_own, uri, "drop")
    resharded = rank_pool(3)(rank_states.load_own, uri, rank_states.last)

    assert [one[:2] for one in first] == [(0, [0])] * 3
    assert [one[:2] for one in dropped] == [(0, [0]), (10, [1, 1]), (70, [7] * 8)]
    assert [one[:2] for one in resharded] == [([0, 10], [1, 1])] * 3


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("a value", "'place.batch'"),
        ("a tensor", "'experts'"),
        ("keys", "'seen'"),
        ("a buffer", "'module.norm.running_mean'"),
        ("random numbers", "'random.torch"),
    ],
)
def test_what_ranks_have_different_ones_of_is_refused(
    rank_pool: RankPools, tmp_path: Path, what: str, named: str
) -> None:
    for said in rank_pool(2)(rank_states.refused, f"{tmp_path}/run", what):
        assert named in said
        assert "rank 1 differs from rank 0" in said
        assert "PerRank" in said
