"""The demo tells its story to the end, on its own S3 server and in a folder, and leaves nothing running."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

_RUN = Path(__file__).parents[1] / "examples" / "demo" / "run.py"
_QUICK = "--every=2"
_LIMIT = 500
"""Seconds after which a run is taken to hang; far above what it needs."""

pytestmark = pytest.mark.timeout(2 * _LIMIT)


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(_RUN), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _play(*arguments: str) -> tuple[int, str, str]:
    with _start(*arguments) as demo:
        try:
            out, err = demo.communicate(timeout=_LIMIT)
        finally:
            demo.terminate()  # no more than a formality when it has ended
    return demo.returncode, out, err


def _assert_the_story_was_told(returncode: int, out: str, err: str) -> None:
    assert returncode == 0, out + err
    assert err == ""
    assert "SIGKILL to checkpoint process" in out
    assert "SIGKILL: torchrun and every rank are gone" in out
    for claim in (
        "its save failed on 2 of 2 ranks, with one error that names the cause",
        "cannot be loaded",
        "training went on through it: steps",
        "was committed by new processes",
        "the newest checkpoint is the one before",
        "is half-written, and cannot be loaded",
        "the same to the last bit",
        "no upload is pending",
        "every object belongs to one of",
        "values, bit for bit the same",
    ):
        assert any(line.startswith("   ok ") and claim in line for line in out.splitlines()), out
    assert "FAILED" not in out
    *_, error = re.findall(r"step-\d+ failed on rank \d:\n((?: {5}.*\n)+)", out)
    assert re.match("ExecutorDiedError: the checkpoint process of rank 1 .*SIGKILL", " ".join(error.split()))
    assert "\033" not in out, "a pipe gets no colours"


def test_demo_loses_nothing_on_its_own_s3_server() -> None:
    code, out, err = _play(_QUICK)
    _assert_the_story_was_told(code, out, err)
    assert "FsspecReader and cloudckpt.StorageReader" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.soak  # on an S3 server it runs each time
def test_demo_loses_nothing_on_its_own_gcs_server() -> None:
    code, out, err = _play(_QUICK, "--store=gcs")
    _assert_the_story_was_told(code, out, err)
    assert "FsspecReader and cloudckpt.StorageReader" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.soak
def test_demo_in_a_folder_keeps_its_checkpoints_and_touches_nothing_else(tmp_path: Path) -> None:
    neighbour = tmp_path / "step-1" / "neighbour"
    neighbour.parent.mkdir()
    neighbour.write_text("mine")
    code, out, err = _play(_QUICK, "--uri", tmp_path.as_uri())
    _assert_the_story_was_told(code, out, err)
    assert neighbour.read_text() == "mine"
    (own,) = tmp_path.glob("demo-*")
    assert own.as_uri() in out
    committed = {path.parent.name for path in own.glob("*/.metadata")}
    assert len(committed) >= 4  # more, where a kill came too late
    late = set(re.findall(r"(step-\d+) \.\.\. was committed before the kill", out))
    assert committed == late | set(re.findall(r"(step-\d+) saved:", out))
    failed = set(re.findall(r"(step-\d+) failed on rank", out)) - late
    assert len(failed) == 1 and committed.isdisjoint(failed)
    assert {path.name for path in tmp_path.iterdir()} == {own.name, "step-1"}


@pytest.mark.soak
def test_interrupted_demo_stops_every_process_of_its_own() -> None:
    with _start(_QUICK) as demo:
        assert demo.stdout is not None
        try:
            while "step   1 " not in (line := demo.stdout.readline()):
                assert line, "the demo ended before it trained"
            demo.send_signal(signal.SIGINT)
            # Its S3 server holds the same stderr, so this returns only when both have ended; the demo
            # itself ends only after the pipe that it shares with torchrun and the ranks was closed by all.
            _, err = demo.communicate(timeout=_LIMIT)
        finally:
            demo.terminate()
    assert demo.returncode == 128 + signal.SIGINT
    assert "Interrupted" in err


def test_demo_refuses_a_place_that_it_cannot_use(tmp_path: Path) -> None:
    code, _, err = _play("--uri", "memory://demo")
    assert code == 2
    assert "--uri takes" in err
    file = tmp_path / "file"
    file.touch()
    code, out, err = _play("--uri", (file / "below").as_uri())
    assert code == 1, out
    assert "The demo could not go on" in err
    assert str(file) in err
