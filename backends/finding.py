"""A finding of an examination: one fact, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed", "unknown", "skipped"]
"""``warning``: it works, at a cost or a risk. ``unknown``: it could not be found out. ``skipped``: it makes
no sense after what failed before."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """Which, in a word or two."""
    state: State
    what: str
    """What was found."""
    advice: str = ""
    """What to do about it, in a sentence or two."""
    action: str = ""
    """The permission that is missing, and on what: ``s3:PutObject on arn:aws:s3:::bucket/run/*``."""
