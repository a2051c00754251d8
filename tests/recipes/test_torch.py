"""Recipes of plain PyTorch: trained, killed, resumed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.places import GCS, Place, new_place
from support.recipes import (
    BEYOND,
    Recipe,
    Told,
    assert_goes_on_after_a_kill,
    assert_went_on,
    finished,
    newest,
    started,
)
from support.servers import S3Server


@pytest.mark.soak
def test_ddp_on_s3(tmp_path: Path, s3_server_named: Callable[[str], S3Server]) -> None:
    assert_goes_on_after_a_kill(Recipe("ddp.py", ranks=2), new_place("moto", tmp_path, s3_server_named))


@pytest.mark.soak
def test_fsdp2_on_gcs(tmp_path: Path, s3_server_named: Callable[[str], S3Server]) -> None:
    assert_goes_on_after_a_kill(Recipe("fsdp2.py", ranks=2), new_place(GCS, tmp_path, s3_server_named))


@pytest.mark.soak
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_fsdp2_on_another_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    """Without dropout, which draws other numbers then, the losses are those of before, but for rounding."""
    place = Place.in_folder(tmp_path)
    run = place.child("run")
    killed, resuming = (Recipe("fsdp2.py", ranks, arguments=("--dropout", "0")) for ranks in (before, after))
    killed.run_until_killed(run)
    start = newest(run)
    assert start is not None
    undisturbed = killed.start(place.child("undisturbed"), start + BEYOND)
    resumed = resuming.run(run, start + BEYOND)
    expected = numbers(finished(undisturbed))
    assert resumed.start == start
    assert numbers(resumed) == pytest.approx(
        {step: loss for step, loss in expected.items() if step > start}, rel=1e-4
    )


def numbers(told: Told) -> dict[int, float]:
    return {step: float(loss) for step, loss in told.losses.items()}


@pytest.mark.soak
def test_titan_in_a_folder(tmp_path: Path) -> None:
    assert_goes_on_after_a_kill(Recipe("titan.py", ranks=2), Place.in_folder(tmp_path))


@pytest.mark.soak
def test_a_run_of_torch_save_goes_on(tmp_path: Path) -> None:
    """Its losses are those that the old loop would have come to."""
    place = Place.in_folder(tmp_path / "run")
    file, saved = tmp_path / "last.pt", 7
    finished(legacy(file, saved))
    recipe = Recipe("replace_torch_save.py", arguments=("--legacy", str(file)))
    recipe.run_until_killed(place, beyond=saved)
    file.unlink()  # it was of use once
    start = newest(place)
    assert start is not None and start > saved
    undisturbed = legacy(tmp_path / "undisturbed.pt", start + BEYOND)
    resumed = recipe.run(place, start + BEYOND)
    assert_went_on(start, resumed, finished(undisturbed))


def legacy(file: Path, steps: int) -> subprocess.Popen[str]:
    script = str(Path(__file__).parents[1] / "support" / "legacy.py")
    return started([sys.executable, script, str(file), str(steps)], {})
