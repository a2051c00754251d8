"""Faults that requests to the GCS server of the tests meet."""

from __future__ import annotations

import re
from dataclasses import dataclass

from support.gcs_objects import Json, invalid


@dataclass(slots=True)
class Fault:
    """What happens instead of, or after, what some requests ask for."""

    method: re.Pattern[str]
    path: re.Pattern[str]
    do: str
    times: int
    skip: int
    retry_after: bool

    @classmethod
    def parse(cls, told: Json) -> Fault:
        do, times, skip = str(told["do"]), told.get("times", 1), told.get("skip", 0)
        if not re.fullmatch(r"status (?:429|500|502|503|504)|reset before|reset after|keep \d+", do):
            raise invalid(f"Not a fault: {do}")
        if not isinstance(times, int) or not isinstance(skip, int):
            raise invalid("times and skip are numbers")
        method, path = re.compile(str(told["method"])), re.compile(str(told.get("path", "")))
        return cls(method, path, do, times, skip, bool(told.get("retry_after", False)))
