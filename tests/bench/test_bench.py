"""The benchmark measures every form on every state and leaves nothing behind; it asks for no speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.forms import FORMS
from bench.report import percentile

_TESTS = Path(__file__).parents[1]
_TINY = ("--gib=0.01", "--tensors=4", "--small=20", "--repeats=2")


@pytest.mark.soak
def test_every_form_is_measured_on_every_state(tmp_path: Path) -> None:
    folder, written = tmp_path / "saves", tmp_path / "results" / "bench.json"
    folder.mkdir()
    ran = subprocess.run(
        [sys.executable, "-m", "bench", *_TINY, f"--folder={folder}", f"--json={written}"],
        env={**os.environ, "PYTHONPATH": str(_TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stdout
    assert list(folder.iterdir()) == []
    found = json.loads(written.read_text())
    assert found["machine"]["cores"] >= 1
    results = {(result["state"]["name"], result["form"]): result for result in found["results"]}
    assert set(results) == {(state, form) for state in ("4 x 2 MiB", "20 x 16 KiB") for form in FORMS}
    for (state, form), result in results.items():
        assert result["failure"] is None
        assert len(result["samples"]) == 2, "the first save doesn't count"
        assert all(figure > 0 for figure in result["figures"].values())
        assert any(line.split()[:4] == state.split() for line in ran.stdout.splitlines())
        for sample in result["samples"]:
            assert sample["blocked_ms"] < sample["save_ms"]
            assert len(sample["saving_ms"]) == len(sample["idle_ms"])
            assert bool(sample["saving_ms"]) is result["state"]["steps"]
        assert ran.stdout.count(f" {form} ") == 3, "two states, and the steps beside the first"


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert (percentile(values, 50), percentile(values, 99)) == (50.0, 99.0)
    assert percentile([3.0], 99) == 3.0


def test_the_cost_of_checksums_is_measured_with_and_without(tmp_path: Path) -> None:
    written = tmp_path / "integrity.json"
    ran = subprocess.run(
        [sys.executable, "-m", "bench.integrity", "--gib=0.03", "--repeats=1", f"--json={written}"],
        env={**os.environ, "PYTHONPATH": str(_TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    samples = json.loads(written.read_text())["cpu_seconds"]
    assert all(len(samples[what][kind]) == 1 for what in ("save", "load") for kind in ("with", "without"))
