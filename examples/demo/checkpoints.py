"""Which checkpoints a run has: one folder a step, committed once its ``.metadata`` is there."""

from __future__ import annotations

import re

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.stores import open_store

METADATA = ".metadata"


def step_name(step: int) -> str:
    """Name the folder of one step's checkpoint."""
    return f"step-{step}"


def child(uri: str, name: str) -> str:
    """Return the URI of ``name`` below ``uri``, whose query (``?endpoint_url=...``) stays at the end."""
    root, mark, query = uri.partition("?")
    return f"{root.rstrip('/')}/{name}{mark}{query}"


def committed_steps(uri: str) -> list[int]:
    """Return the committed steps below ``uri``, oldest first; a save that was cut off is not among them."""
    with open_store(Target.parse(uri)) as store:
        names = {info.name for info in store.list("step-").objects}
    found = (re.fullmatch(rf"step-(\d+)/{re.escape(METADATA)}", name) for name in names)
    return sorted(int(match[1]) for match in found if match)
