"""The comparison on GCS runs every form on every state, and counts what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import gcs


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # which gcsfs does
def test_every_form_is_measured_on_every_state(tmp_path: Path) -> None:
    to = tmp_path / "gcs.json"
    sizes = [
        "--gib=0.0625",
        "--small=20",
        "--layers=1",
        "--width=16",
        "--repeats=1",
        "--distance=near",
        "--no-tls",
    ]
    assert gcs.main([*sizes, f"--json={to}", f"--picture={tmp_path / 'gcs.svg'}"]) == 0
    results = json.loads(to.read_text())["results"]
    measured = {(result["state"], result["what"], result["peer"]) for result in results}
    assert measured >= {
        (state, what, peer)
        for state in ("large", "small")
        for what in ("save", "load")
        for peer in ("cloudckpt", "gcsfs")
    }
