"""Find the CPython interpreters of this machine that can make a virtual environment."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, NamedTuple

SUPPORTED: Final = ((3, 11), (3, 12), (3, 13), (3, 14))
"""Versions of Python that pyproject.toml has classifiers for, oldest first."""

# `venv` without `ensurepip` (Debian's python3 without python3-venv) makes an environment without pip.
_PROBE: Final = (
    "import sys, venv, ensurepip; assert sys.implementation.name == 'cpython'; "
    "print(sys.version_info[0], sys.version_info[1], sys.executable)"
)


class Version(NamedTuple):
    """A minor version of Python."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


class Interpreter(NamedTuple):
    """A Python that runs."""

    version: Version
    path: str


def version_of(command: str) -> Interpreter | None:
    """Start a Python; return its version and real path, or None where it does not run or has no venv."""
    try:
        ran = subprocess.run([command, "-c", _PROBE], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if ran.returncode:
        return None
    major, minor, path = ran.stdout.strip().split(" ", 2)
    return Interpreter(Version(int(major), int(minor)), path)


def _places(version: Version) -> Iterator[str]:
    """Candidates for one version: PATH, pyenv's folder, uv's folder, usual folders."""
    name = f"python{version}"
    for folder in os.get_exec_path():
        if (found := shutil.which(name, path=folder)) is not None:
            yield found
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", Path.home() / ".local/share/uv/python"))
    usual = [Path("/usr/local/bin"), Path("/opt/homebrew/bin"), Path("/usr/bin")]
    for pattern in (pyenv / "versions", uv):
        usual += sorted((found / "bin" for found in pattern.glob(f"*{version}.*")), reverse=True)
    yield from (str(folder / name) for folder in usual if (folder / name).exists())


def find(version: Version) -> Interpreter | None:
    """Return the first interpreter of this version that runs and can make environments."""
    for place in dict.fromkeys(_places(version)):
        found = version_of(place)
        if found is not None and found.version == version:
            return found
    return None


def how_to_get(version: Version) -> str:
    """Return the line for a version that was not found: what was tried and how to install it."""
    return (
        f"Python {version} not found (tried python{version} on PATH, of pyenv and of uv, with venv and pip). "
        f"Install it: `pyenv install {version}` or `uv python install {version}`"
    )


def choose(*, newest: bool, without: Collection[Version] = ()) -> tuple[Interpreter | None, list[str]]:
    """Return the oldest or newest supported interpreter, and a line for each version that was not found."""
    missing: list[str] = []
    for pair in sorted(SUPPORTED, reverse=newest):
        version = Version(*pair)
        if version in without:
            continue
        if (found := find(version)) is not None:
            return found, [] if without else missing
        missing.append(how_to_get(version))
    return None, missing
