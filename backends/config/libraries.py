"""Optional libraries: what to install where one is missing."""

from __future__ import annotations

from importlib import metadata
from typing import Final

_PROJECT: Final = "cloudckpt"


def install_hint(extra: str, missing: str | None) -> str:
    """Return how to install the libraries of an extra, by their own names.

    Args:
        extra: such as ``s3``.
        missing: the module that could not be imported, for a project that was not installed by pip.
    """
    libraries = required(extra) or [(missing or extra).partition(".")[0]]
    return "Install the libraries that it takes: pip install " + " ".join(map(_quoted, libraries))


def required(extra: str) -> list[str]:
    """Return the requirements of an extra, such as ``s3fs>=2025.3``; none where pip knows nothing of them."""
    try:
        every = metadata.requires(_PROJECT) or []
    except metadata.PackageNotFoundError:
        return []
    split = [requirement.partition(";") for requirement in every]
    marked = [(name.strip(), marker.replace("'", '"').replace(" ", "")) for name, _, marker in split]
    return [name for name, marker in marked if f'extra=="{extra}"' in marker]


def _quoted(requirement: str) -> str:
    return f'"{requirement}"' if set(requirement) & set("<>=!~[ ") else requirement
