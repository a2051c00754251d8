"""Checkpoints that earlier releases wrote load bit-exact: ``support.released`` says how they were made."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import cloudckpt
from support.ranks import RankPools
from support.released import KINDS, STEP, differences, differences_on

ARCHIVES = sorted((Path(__file__).parent / "fixtures").glob("release-*.zip"))
MOST = 300 << 10
"""Bytes that the archives may take in the repository, together."""

Runs = Callable[[Path], Path]


def kinds_in(archive: Path) -> list[str]:
    """Return the names of the runs, of which a later release may have more."""
    with zipfile.ZipFile(archive) as packed:
        return sorted({Path(name).parts[0] for name in packed.namelist()})


CASES = [
    pytest.param(archive, name, id=f"{archive.stem}-{name}")
    for archive in ARCHIVES
    for name in kinds_in(archive)
]
OF_RANKS = [case for case in CASES if KINDS[str(case.values[1])].ranks > 1]


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Unpack an archive once."""
    unpacked: dict[Path, Path] = {}

    def unpack(archive: Path) -> Path:
        if archive not in unpacked:
            unpacked[archive] = tmp_path_factory.mktemp(archive.stem)
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(unpacked[archive])
        return unpacked[archive]

    return unpack


def test_there_is_a_release_and_all_of_them_are_small() -> None:
    assert ARCHIVES
    assert sum(archive.stat().st_size for archive in ARCHIVES) <= MOST


@pytest.mark.parametrize(("archive", "name"), CASES)
def test_it_loads_bit_exact_in_one_process(archive: Path, name: str, runs_of: Runs) -> None:
    assert differences(runs_of(archive), name, None) == []


@pytest.mark.parametrize(("archive", "name"), OF_RANKS)
def test_it_loads_bit_exact_on_the_ranks_that_saved(
    archive: Path, name: str, runs_of: Runs, rank_pool: RankPools
) -> None:
    assert rank_pool(2)(differences_on, runs_of(archive), name) == [[], []]


@pytest.mark.parametrize(("archive", "name"), CASES)
def test_it_is_verified_without_findings(archive: Path, name: str, runs_of: Runs) -> None:
    with cloudckpt.Checkpointer(runs_of(archive) / name, progress=False) as checkpointer:
        assert checkpointer.all_steps() == [STEP]

    found = cloudckpt.verify((runs_of(archive) / name / f"step-{STEP:010}").as_uri())

    assert (found.damages, found.unverified) == ((), 0)
