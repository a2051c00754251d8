"""What the README and the guide show, runs; what they link to, is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "terraform").rglob("README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCKS = [
    (page, number, block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize(
    ("page", "block"),
    [pytest.param(page, block, id=f"{page.relative_to(ROOT)}-{number}") for page, number, block in BLOCKS],
)
def test_a_code_block_runs_as_it_stands(page: Path, block: str, tmp_path: Path) -> None:
    here = block.replace("/tmp/cloudckpt", f"{tmp_path}/cloudckpt")  # noqa: S108 - what the page says
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", here], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, f"{page}:\n{ran.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_within_the_project_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_test_that_is_named_exists(page: Path) -> None:
    for name in re.findall(r"`(tests/[\w/]+\.py)`", page.read_text()):
        assert (ROOT / name).exists(), f"{page} names {name}"


def test_the_site_has_every_page() -> None:
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    there = [
        str(page.relative_to(ROOT / "docs" if page.is_relative_to(ROOT / "docs") else ROOT))
        for page in PAGES
        if page.parent != ROOT
    ]
    assert sorted(listed) == sorted(there)


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for named in re.findall(r"(?:`|^)make ([a-z]+)", page.read_text(), re.MULTILINE):
            assert named in targets, f"{page} names `make {named}`"
