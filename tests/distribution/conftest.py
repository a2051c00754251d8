"""Wheels built from a copy of the tree, where setuptools finds no `build` folder of old and leaves none."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "cloudckpt", "backends", "executor")


def copy_tree(to: Path) -> Path:
    """Copy what a build reads, links as links."""
    to.mkdir()
    for name in BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, to / name)
    return to


def build(source: Path, out: Path, *what: str) -> Path:
    """Build with the tools of this environment, so that nothing is downloaded; the wheel in `out`."""
    command = [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `pip install .` makes."""
    folder = tmp_path_factory.mktemp("wheel")
    return build(copy_tree(folder / "tree"), folder / "dist", "--wheel")


@pytest.fixture(scope="session")
def wheel_of_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that a release makes: from the source archive, not from the tree."""
    folder = tmp_path_factory.mktemp("sdist")
    return build(copy_tree(folder / "tree"), folder / "dist")
