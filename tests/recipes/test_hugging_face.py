"""Recipes for Hugging Face's Trainer and for Accelerate: trained, killed, resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.places import Place, new_place
from support.recipes import Recipe, assert_goes_on_after_a_kill
from support.servers import S3Server


def test_a_trainer_goes_on_within_its_epoch_on_s3(
    tmp_path: Path, s3_server_named: Callable[[str], S3Server]
) -> None:
    place = new_place("moto", tmp_path, s3_server_named)

    assert_goes_on_after_a_kill(Recipe("hf_trainer.py"), place)


@pytest.mark.soak
def test_a_trainer_that_is_done_takes_no_further_step(tmp_path: Path) -> None:
    place = Place.in_folder(tmp_path / "run")
    recipe = Recipe("hf_trainer.py")
    assert max(recipe.run(place, 5).losses) == 5

    again = recipe.run(place, 5)

    assert (again.start, again.losses) == (5, {})


@pytest.mark.soak
def test_a_loop_with_accelerate_goes_on_on_s3(
    tmp_path: Path, s3_server_named: Callable[[str], S3Server]
) -> None:
    place = new_place("moto", tmp_path, s3_server_named)

    assert_goes_on_after_a_kill(Recipe("accelerate_loop.py", ranks=2), place)
