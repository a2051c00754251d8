"""Imports go one way, cloudckpt → executor → backends, under one name: the checks do catch a breach."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """Hold a tree to the contracts of pyproject.toml."""
    return subprocess.run(
        [TOOLS / "lint-imports", "--no-cache"], cwd=tree, capture_output=True, text=True, check=False
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources to do wrong in."""
    for name in ("cloudckpt", "backends", "executor"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("module", "breach"),
    [
        ("backends/stores/base.py", "import cloudckpt.executor"),
        ("backends/stores/__init__.py", "from cloudckpt import executor"),
        ("backends/stores/base.py", "from cloudckpt import StorageWriter"),
        ("executor/__init__.py", "import cloudckpt"),
    ],
)
def test_an_import_against_the_direction_is_caught(tree: Path, module: str, breach: str) -> None:
    assert lint_imports(tree).returncode == 0
    with (tree / module).open("a") as source:
        source.write(f"\n{breach}\n")

    assert lint_imports(tree).returncode == 1


def test_a_front_door_module_without_a_place_in_the_layers_is_caught(tree: Path) -> None:
    (tree / "cloudckpt" / "newcomer.py").touch()

    assert lint_imports(tree).returncode == 1


@pytest.mark.parametrize(
    "statement", ["import backends", "from backends.store import ObjectStore", "import executor"]
)
def test_a_second_name_for_the_root_folders_is_caught(statement: str) -> None:
    checked = subprocess.run(
        [TOOLS / "ruff", "check", "--select", "TID251", "--stdin-filename", "tests/test_new.py", "-"],
        cwd=ROOT, input=f"{statement}\n", capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert checked.returncode == 1
