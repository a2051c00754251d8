"""What the site takes from outside of this folder: terraform/ with its examples, and the recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Add them."""
    modules = ROOT / "terraform"
    recipes = (ROOT / "examples" / "recipes").glob("*.*")
    for page in sorted([*modules.rglob("README.md"), *modules.glob("*/examples/*/main.tf"), *recipes]):
        path = page.relative_to(ROOT)
        if not any(part.startswith(".") for part in path.parts):
            files.append(File.generated(config, str(path), abs_src_path=str(page)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Have links to them lead to where they are in the site."""
    if page.file.src_uri.startswith("terraform/"):
        return markdown
    up = "../" * page.file.src_uri.count("/")
    for outside in ("terraform", "examples"):
        markdown = markdown.replace(f"]({up}../{outside}/", f"]({up}{outside}/")
    return markdown
