"""The storage comparison measures every peer and sees what loads wrongly; it asks for no speed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench.comparison import Result, Sample, best_peer, markdown, paired_ratio
from bench.contest import measured
from bench.peers import CURL, FLOOR, FOLDER, LIMITED, OURS, PEERS, Peer, Place
from bench.states import Large, Small, State, Training, differences, emptied
from bench.worker import Spent, What

_TESTS = Path(__file__).parents[1]
_TINY = ("--gib=0.03", "--small=20", "--layers=1", "--width=16", "--repeats=2")
_WRITES_GARBAGE = {"obstore"}


@pytest.mark.soak
def test_every_peer_is_measured_on_every_state(tmp_path: Path) -> None:
    folder, written = tmp_path / "folder", tmp_path / "results" / "storage.json"
    picture, document = tmp_path / "picture.svg", tmp_path / "tables.md"
    folder.mkdir()
    outputs = (f"--folder={folder}", f"--json={written}", f"--picture={picture}", f"--markdown={document}")
    ran = subprocess.run(
        [sys.executable, "-m", "bench.storage", *_TINY, "--distance=near", "--no-tls", *outputs],
        env={**os.environ, "PYTHONPATH": str(_TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert list(folder.iterdir()) == []
    results = {
        (result["state"], result["what"], result["peer"]): result
        for result in json.loads(written.read_text())["results"]
    }
    assert set(results) == {
        (state, what, peer)
        for state in ("large", "small", "training")
        for what in ("save", "load")
        for peer in PEERS
        if peer not in {LIMITED, CURL} or state == "large"
    }
    for (_, what, peer), result in results.items():
        if peer in _WRITES_GARBAGE and what == "load":
            assert result["failure"] or result["wrong"]
            continue
        assert (result["failure"], result["wrong"]) == (None, [])
        assert result["sound"] is (peer not in _WRITES_GARBAGE)
        assert len(result["samples"]) == 2, "the first turn doesn't count"
        figures = result["figures"]
        assert figures["seconds"] > 0 and figures["seconds_to_ours"] > 0
        if peer == FOLDER:
            assert figures["requests"] == 0
        else:
            assert figures["requests"] > 0 and figures["amplification"] >= 1
    assert picture.read_text().startswith("<?xml")
    assert all(f"| {peer}" in document.read_text() for peer in PEERS)
    assert results["large", "load", FLOOR]["figures"]["requests"] <= 8


@contextmanager
def corrupting(place: Place) -> Iterator[Peer]:
    """Loads one bit wrong."""
    with PEERS[FOLDER](place) as sound:

        def load(state: State, name: str) -> None:
            sound.load(state, name)
            next(iter(state["model"].values())).view(torch.uint8)[0] ^= 1

        yield Peer(sound.save, load)


@contextmanager
def failing(place: Place) -> Iterator[Peer]:
    """Can't save."""

    def save(state: State, name: str) -> None:
        if name != "warm-up":
            raise OSError("no room")

    yield Peer(save, save)


def test_a_peer_that_loads_a_bit_wrong_or_fails_is_reported_and_the_others_are_measured(
    tmp_path: Path,
) -> None:
    here = importlib.import_module("bench.test_storage")  # under the name that the workers know it by
    peers = {OURS: PEERS[OURS], "corrupting": here.corrupting, "failing": here.failing}
    results = {
        (result.what, result.peer): result
        for result in measured(Small(3), peers, repeats=1, folder=tmp_path / "small")
    }
    assert results["load", "corrupting"].wrong == ["model.tensor-0"]
    assert results["load", "corrupting"].verdict == "loads wrongly: 1 values, model.tensor-0 one of them"
    assert results["save", "corrupting"].verdict == "what it saved doesn't load as it was"
    assert results["save", "failing"].failure == results["load", "failing"].failure == "OSError: no room"
    assert results["save", OURS].verdict is results["load", OURS].verdict is None
    assert best_peer(list(results.values()), "load", "small") is None


@pytest.mark.parametrize("shape", [Large(2, 64), Small(3, 64), Training(1, 16)], ids=lambda shape: shape.name)
def test_what_was_emptied_differs_from_what_is_saved_in_every_value(
    shape: Large | Small | Training, tmp_path: Path
) -> None:
    shape.lay(tmp_path)
    saved, blank = shape.make(tmp_path)
    assert differences(saved, saved) == []
    found = differences(emptied(blank), saved)
    kept, _ = shape.make(tmp_path)
    assert differences(kept, saved) == [], "the one to load into has memory of its own"
    assert len(found) == len(differences({}, saved)) > 0


def test_ratios_are_of_pairs_and_the_best_peer_is_one_that_counts() -> None:
    assert paired_ratio([2.0, 9.0, 3.0], [1.0, 3.0, 3.0]) == 2.0

    def result(peer: str, seconds: float, what: What = "save", *, sound: bool = True) -> Result:
        samples = [Sample(Spent(seconds, seconds / 2, 0), {"PutObject": 2}, 1 << 30, 0, 0.0)] * 2
        return Result("large", "1 x 1 GiB", 1 << 30, what, peer, samples, sound=sound)

    ours, unsound, slower = result(OURS, 1.0), result("a", 2.0, sound=False), result("b", 3.0)
    floor, folder = result(FLOOR, 0.1), result(FOLDER, 0.1)
    results = [ours, unsound, slower, floor, folder, result("a", 2.0, "load")]
    assert best_peer(results, "save", "large") is slower
    assert slower.figures(ours) == {
        "seconds": 3.0,
        "cpu_seconds_per_gib": 1.5,
        "extra_mib": 0.0,
        "requests": 2,
        "amplification": 1.0,
        "seconds_to_ours": 3.0,
        "cpu_to_ours": 3.0,
    }
    facts = dict.fromkeys(("cores", "processor", "python", "torch", "repeats", "file_system"), "x")
    document = markdown(results, {**facts, "load": 0.0, "options": {}})
    assert "| b | 3.00 | 1.50 | 0 | 2 | 1.00 | 3.00 | 3.00 |" in document
    assert "| a (!) |" in document
