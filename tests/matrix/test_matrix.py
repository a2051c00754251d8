"""The tool behind `make matrix`: floors, interpreters, stand-ins, and what it says of what is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from matrix import __main__ as command
from matrix import environment, floors, interpreters, stubs
from matrix.interpreters import Interpreter, Version


def test_every_requirement_has_a_floor() -> None:
    pinned = floors.lowest_of_all()
    assert pinned and all("==" in one for one in pinned)
    assert floors.torch_floor() == "2.9"


@pytest.mark.parametrize(
    ("requirement", "pinned"),
    [("a>=1.2", "a==1.2"), ("a-b>=1,<3", "a-b==1"), ("a[x,y]>=2.0.1", "a[x,y]==2.0.1")],
)
def test_a_requirement_is_pinned_to_its_floor(requirement: str, pinned: str) -> None:
    assert floors.lowest(requirement) == pinned


def test_a_requirement_without_a_floor_is_refused() -> None:
    with pytest.raises(ValueError, match="has no floor"):
        floors.lowest("a")


def test_the_versions_of_python_are_those_of_the_classifiers() -> None:
    project = tomllib.loads((floors.ROOT / "pyproject.toml").read_text())["project"]
    named = [f"Programming Language :: Python :: {major}.{minor}" for major, minor in interpreters.SUPPORTED]
    assert [one for one in project["classifiers"] if one in named] == named
    assert project["requires-python"] == ">=3.11"


def test_what_does_not_run_is_no_interpreter(tmp_path: Path) -> None:
    broken = tmp_path / "python3.11"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    assert interpreters.version_of(str(broken)) is None
    assert interpreters.version_of(str(tmp_path / "absent")) is None
    found = interpreters.version_of(sys.executable)
    assert found is not None and found.version == sys.version_info[:2]


def test_a_missing_interpreter_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    present = Interpreter(Version(3, 12), "/somewhere/python3.12")
    monkeypatch.setattr(interpreters, "find", lambda version: present if version == (3, 12) else None)
    found, missing = interpreters.choose(newest=True)
    assert found == present
    assert [line.split(" not found")[0] for line in missing] == ["Python 3.14", "Python 3.13"]
    assert all("pyenv install" in line for line in missing)


def test_nothing_at_hand_is_said_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interpreters, "find", lambda _: None)
    assert command.main([]) == 0
    assert "NOTHING WAS TRIED" in capsys.readouterr().out


def test_the_end_of_the_time_is_said() -> None:
    with pytest.raises(environment.BrokenError, match=r"limit of 0 s .* make matrix MATRIX='--limit"):
        environment.Deadline(0).left("run the tests")


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs a C compiler and ELF files"
)
def test_a_library_loads_with_stand_ins_for_what_it_is_linked_to(tmp_path: Path) -> None:
    """With versioned and unversioned functions, as of CUDA and of NCCL."""
    real, folder = tmp_path / "real", tmp_path / "lib"
    real.mkdir()
    folder.mkdir()

    def build(output: Path, source: str, *options: str) -> None:
        code = output.with_suffix(".c")
        code.write_text(source)
        subprocess.run(
            [str(shutil.which("cc")), "-shared", "-fPIC", "-o", output, code, *options], check=True
        )

    (real / "map").write_text("libcuda_x.so.1 { global: *; };")
    script = f"-Wl,--version-script={real / 'map'}"
    build(real / "libcuda_x.so.1", "int cuX(void) { return 1; }", "-Wl,-soname,libcuda_x.so.1", script)
    build(real / "libnccl.so.2", "int ncclY(void) { return 1; }", "-Wl,-soname,libnccl.so.2")
    user = "int cuX(void); int ncclY(void); int both(void) { return cuX() + ncclY(); }"
    linked = [f"-Wl,-rpath,{folder}", str(real / "libcuda_x.so.1"), str(real / "libnccl.so.2")]
    build(folder / "libuser.so", user, *linked)
    load = (
        f"import ctypes; print(ctypes.CDLL({str(folder / 'libuser.so')!r}, mode=ctypes.RTLD_GLOBAL).both())"
    )
    command_line = [sys.executable, "-c", load]
    assert subprocess.run(command_line, capture_output=True, check=False).returncode
    assert stubs.write(folder) == ["libcuda_x.so.1", "libnccl.so.2"]
    assert subprocess.run(command_line, capture_output=True, text=True, check=True).stdout == "200\n"
    assert stubs.write(folder) == []
