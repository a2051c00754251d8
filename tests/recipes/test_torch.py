"""Recipes of plain PyTorch: trained, killed, resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from support.places import new_place
from support.recipes import Recipe, assert_goes_on_after_a_kill
from support.servers import S3Server


def test_ddp_on_s3(tmp_path: Path, s3_server_named: Callable[[str], S3Server]) -> None:
    assert_goes_on_after_a_kill(Recipe("ddp.py", ranks=2), new_place("moto", tmp_path, s3_server_named))
