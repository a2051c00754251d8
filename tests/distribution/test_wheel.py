"""The wheel holds what the tree holds: a package that pyproject.toml does not list is missing only there."""

import os
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def importable(tree: Path) -> set[str]:
    """Files that make up the package, named as imports see them: through the links in `cloudckpt`."""
    return {
        (Path(folder) / name).relative_to(tree).as_posix()
        for folder, _, names in os.walk(tree / "cloudckpt", followlinks=True)
        for name in names
        if name.endswith(".py") or name == "py.typed"
    }


def contents(wheel: Path) -> set[str]:
    """Files of the wheel, without its own records."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_tree_is_seen_through_its_links() -> None:
    assert {
        "cloudckpt/py.typed",
        "cloudckpt/backends/stores/base.py",
        "cloudckpt/executor/__init__.py",
    } <= importable(ROOT)


@pytest.mark.parametrize("made", ["wheel", "wheel_of_sdist"])
def test_the_wheel_holds_every_module_of_the_tree_and_nothing_else(
    made: str, request: pytest.FixtureRequest
) -> None:
    wheel: Path = request.getfixturevalue(made)

    assert contents(wheel) == importable(ROOT)


def test_the_wheel_carries_the_licence_and_names_the_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        lines = archive.read(metadata).decode().splitlines()

    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in lines
    assert {"s3", "gcs", "cli", "otel", "progress", "all"} == {
        line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")
    }


def test_the_wheel_brings_the_command_line(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (points,) = [name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt")]
        assert "cloudckpt = cloudckpt.cli:main" in archive.read(points).decode().splitlines()
