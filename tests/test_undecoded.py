"""URIs, options and paths with bytes that Python could not decode, as in a C locale: refused, or kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import ConfigurationError
from support.places import Place

UNDECODED = "l\udcc3\udca4uf"
"""What ``läuf`` is in a C locale."""
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
JOB = """
import sys, torch, cloudckpt
if __name__ == "__main__":
    assert sys.getfilesystemencoding() == "ascii"
    with cloudckpt.Checkpointer(sys.argv[1]) as checkpointer:
        checkpointer.save(1, {"t": torch.ones(3)})
        state = {"t": torch.zeros(3)}
        assert checkpointer.load(state) == 1 and state["t"].sum() == 3
        assert cloudckpt.Checkpointer(checkpointer.uri).all_steps() == [1]
        print(checkpointer.uri)
"""


def in_c_locale(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | C_LOCALE, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("protocol", ["s3", "gs", "memory", "ftp"])
def test_a_uri_that_is_no_text_is_refused_with_the_cure(protocol: str) -> None:
    uri = f"{protocol}://bucket/{UNDECODED}"
    for taker in (Target.parse, cloudckpt.StorageWriter, cloudckpt.StorageReader, cloudckpt.Checkpointer):
        with pytest.raises(ConfigurationError, match="no text") as caught:
            taker(uri)
        assert rf"{protocol}://bucket/l\udcc3\udca4uf" in str(caught.value)
        assert "PYTHONUTF8=1" in str(caught.value)
    for taken in (cloudckpt.StorageWriter, cloudckpt.StorageReader):
        assert not taken.validate_checkpoint_id(uri)
        with pytest.raises(ConfigurationError, match="no text"):
            taken("s3://bucket/run").reset(uri)


@pytest.mark.parametrize(
    "options",
    [
        {"profile": UNDECODED},
        {"endpoint_url": f"http://{UNDECODED}:9000"},
        {"storage_options": {"client_kwargs": {"verify": [UNDECODED]}}},
    ],
)
def test_an_option_that_is_no_text_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigurationError, match=f"option '{next(iter(options))}' holds bytes that are no text"
    ):
        Target.parse("s3://bucket/run", **options)


def test_a_query_and_a_variable_that_are_no_text_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="no text"):
        Target.parse(f"s3://bucket/run?profile={UNDECODED}")
    monkeypatch.setattr(os, "environ", {"CLOUDCKPT_PROFILE": UNDECODED})
    with pytest.raises(ConfigurationError, match="environment variable CLOUDCKPT_PROFILE holds bytes"):
        Target.parse("s3://bucket/run")


def test_a_path_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    for uri in (f"{tmp_path}/a\ud800", f"file://{tmp_path}/a\ud800"):
        with pytest.raises(ConfigurationError, match="can't have") as caught:
            Target.parse(uri)
        assert rf"{tmp_path}/a\ud800" in str(caught.value)
        assert not cloudckpt.StorageWriter.validate_checkpoint_id(uri)


def test_a_path_of_undecodable_bytes_is_the_file_of_that_name_and_its_uri_is_text(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/l\xc3uf")
    target = Target.parse(path)
    assert target.uri == f"file://{tmp_path}/l%C3uf"
    assert Target.parse(target.uri).path == target.path == path
    assert target.child("step-1").parted()[0].uri == target.uri
    state = {"t": torch.ones(3)}
    with cloudckpt.Checkpointer(path) as checkpointer:
        checkpointer.save(1, state)
        assert checkpointer.load({"t": torch.zeros(3)}) == 1
    assert [os.fsencode(one.name) for one in tmp_path.iterdir()] == [b"l\xc3uf"]


@pytest.mark.parametrize("how", ["{}", "file://{}"])
def test_a_job_in_a_c_locale_saves_to_a_folder_of_any_name(tmp_path: Path, how: str) -> None:
    job = tmp_path / "job.py"
    job.write_text(JOB)
    done = in_c_locale(str(job), how.format(tmp_path / "läuf"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"file://{tmp_path}/l%C3%A4uf\n"
    assert (tmp_path / "läuf" / "step-0000000001" / ".metadata").exists()


def test_the_command_line_refuses_a_uri_that_is_no_text() -> None:
    done = in_c_locale("-m", "cloudckpt.cli", "ls", "s3://bucket/läuf")
    assert done.returncode == 2, done.stderr
    assert "PYTHONUTF8=1" in "".join(done.stderr.split())


def test_keys_and_values_that_are_no_text_are_saved(folder: Place) -> None:
    key = "k\udcc3"
    with cloudckpt.Checkpointer(folder.uri) as checkpointer:
        checkpointer.save(1, {key: torch.ones(2), "nested": {key: UNDECODED}})
        state: dict[str, Any] = {key: torch.zeros(2), "nested": {key: ""}}
        checkpointer.load(state)
    assert torch.equal(state[key], torch.ones(2))
    assert state["nested"] == {key: UNDECODED}
    assert not cloudckpt.verify(f"{folder.uri}/step-0000000001").damages
