"""The comparison on GCS runs every form on every state, and counts what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import gcs


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # which gcsfs does
def test_every_form_is_measured_on_every_state(tmp_path: Path) -> None:
    to = tmp_path / "gcs.json"
    assert gcs.main(["--gib", "0.0625", "--small", "20", "--repeats", "1", "--json", str(to)]) == 0
    written = json.loads(to.read_text())
    assert set(written) == {"machine", "0.0625 GiB in 32 MiB tensors", "20 x 16 KiB"}
    for forms in (value for key, value in written.items() if key != "machine"):
        assert set(forms) == {"cloudckpt, gs://", "cloudckpt, s3://", "stock DCP, gcsfs"}
        for ways in forms.values():
            assert all(sample["cpu"] > 0 for way in ("save", "load") for sample in ways[way])
