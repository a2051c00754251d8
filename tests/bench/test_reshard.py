"""Resharding is measured in every layout, in both directions, by every form, and what is loaded is right."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.reshard import DIRECTIONS, FORMS, LAYOUTS

_TESTS = Path(__file__).parents[1]
_TENSOR = 4 << 20
"""Bytes; several checksummed chunks in every rank's share."""


@pytest.mark.soak
def test_every_way_to_reshard_is_measured(tmp_path: Path) -> None:
    written, document = tmp_path / "reshard.json", tmp_path / "reshard.md"
    sizes = ("--mib=8", "--tensors=2", "--repeats=1")
    ran = subprocess.run(
        [sys.executable, "-m", "bench.reshard", *sizes, f"--json={written}", f"--markdown={document}"],
        env={**os.environ, "PYTHONPATH": str(_TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    loads = json.loads(written.read_text())["loads"]
    ways = [(load["layout"], (load["saved_by"], load["loaded_by"]), load["form"]) for load in loads]
    assert ways == list(itertools.product(LAYOUTS, DIRECTIONS, FORMS))
    for load in loads:
        (sample,) = load["samples"]
        copies = load["loaded_by"] if load["layout"] == "replicated" else 1
        assert load["stored"] == 2 * _TENSOR
        assert sample["wanted"] == copies * load["stored"]
        assert sample["sent"] >= load["stored"], "every byte has to come at least once"
        assert all(figure > 0 for figure in load["figures"].values())
        if load["form"] == "cloudckpt":
            assert sample["sent"] <= 1.1 * load["stored"], "ranks of one host read together"
    assert document.read_text().count(" cloudckpt ") == len(ways) / len(FORMS)
