"""Read requirements from pyproject.toml: as they are, or each at its lowest version."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
_OURS: Final = "cloudckpt"
_FLOOR: Final = re.compile(r"^(?P<name>[\w.-]+(?:\[[\w,-]+\])?)>=(?P<version>[\w.]+)(?:,.*)?$")


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements() -> list[str]:
    """Return every requirement of the package and its extras, but torch, as pyproject.toml has it."""
    project = _pyproject()["project"]
    listed = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    return sorted({one for one in listed if not one.startswith((_OURS, "torch"))})


def torch_floor() -> str:
    """Return the lowest version of torch that pyproject.toml allows."""
    for one in _pyproject()["project"]["dependencies"]:
        if one.startswith("torch>="):
            return lowest(one).partition("==")[2]
    raise ValueError("pyproject.toml has no requirement torch>=…")


def lowest(requirement: str) -> str:
    """Return a requirement at its floor: ``name>=1.2,<3`` becomes ``name==1.2``."""
    found = _FLOOR.match(requirement.replace(" ", ""))
    if found is None:
        raise ValueError(f"{requirement!r} in pyproject.toml has no floor: write name>=version")
    return f"{found['name']}=={found['version']}"


def lowest_of_all() -> list[str]:
    """Return every requirement of the package and its extras at its floor, but torch."""
    return [lowest(one) for one in requirements()]


def build_backend(*, oldest: bool) -> list[str]:
    """Return what builds the package, at its floor or as pyproject.toml has it."""
    listed: Sequence[str] = _pyproject()["build-system"]["requires"]
    return [lowest(one) if oldest else one for one in listed]


def test_tools() -> list[str]:
    """Return the dependency group that the subset of the tests needs."""
    listed: Sequence[str] = _pyproject()["dependency-groups"]["matrix"]
    return list(listed)
