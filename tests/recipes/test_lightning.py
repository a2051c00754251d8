"""The recipe for Lightning: trained, killed, resumed, and told to end."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from support.places import Place
from support.recipes import ENDLESS, Recipe, Told, assert_goes_on_after_a_kill, newest


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.soak)])
def test_fit_goes_on_and_lightning_writes_nothing_itself(tmp_path: Path, ranks: int) -> None:
    working = tmp_path / "working"
    working.mkdir()
    recipe = Recipe("lightning_fit.py", ranks=ranks, folder=working)

    assert_goes_on_after_a_kill(recipe, Place.in_folder(tmp_path / "run"))

    assert list(working.iterdir()) == []


@pytest.mark.soak
def test_a_last_step_is_saved_though_lightning_takes_signals_too(tmp_path: Path) -> None:
    place = Place.in_folder(tmp_path / "run")
    told = Told()

    with Recipe("lightning_fit.py").start(place, ENDLESS) as process:
        assert process.stdout is not None
        for line in process.stdout:
            told.take(line.strip())
            if line.startswith("step 2 "):
                process.send_signal(signal.SIGTERM)

    assert process.returncode == 128 + signal.SIGTERM
    assert newest(place) == max(told.losses) + 1
