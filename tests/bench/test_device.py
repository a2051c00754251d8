"""The comparison on a device says so where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import device

here = torch.cuda.is_available()


@pytest.mark.skipif(here, reason="there is a CUDA device")
def test_without_a_device_it_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert device.main(["--json", str(tmp_path / "device.json")]) == 2
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not here, reason="needs a CUDA device")
def test_every_form_saves_and_loads_what_is_on_the_device(tmp_path: Path) -> None:
    to = tmp_path / "device.json"
    assert device.main(["--gib", "0.125", "--small", "50", "--repeats", "1", "--json", str(to)]) == 0
    written = json.loads(to.read_text())
    assert set(written) == {"machine", "0.125 GiB in 32 MiB tensors", "50 x 16 KiB"}
    for forms in (value for key, value in written.items() if key != "machine"):
        assert all(len(ways["save"]) == len(ways["load"]) == 1 for ways in forms.values())
