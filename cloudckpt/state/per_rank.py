"""Temporary."""

from __future__ import annotations
from collections.abc import Callable
from typing import Any


class PerRank:
    def __init__(self, value: Any, on_resize: str | Callable[..., Any] = "error") -> None:
        self.value = value
        self.on_resize = on_resize


def resize(values: list[Any], rank: int, world_size: int, on_resize: Any) -> Any:
    return on_resize(values, rank, world_size)
