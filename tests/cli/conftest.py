"""Places for commands to look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.places import FOLDER, GCS, Place, new_place
from support.servers import S3Server


@pytest.fixture(params=[FOLDER, "moto", GCS])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, s3_server_named: Callable[[str], S3Server]
) -> Place:
    """A folder, S3 and GCS in turn."""
    return new_place(request.param, tmp_path, s3_server_named)


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    """A folder alone, for what no store has a part in."""
    return Place.in_folder(tmp_path / "run")
