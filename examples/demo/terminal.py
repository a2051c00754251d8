"""Telling a story in numbered steps, with claims that are counted at the end."""

from __future__ import annotations

import os
import sys
from typing import TextIO

INDENT = "   "
_BOLD, _RED, _GREEN = "1", "31", "32"


class Story:
    """Numbered steps on a terminal 80 columns wide; no colour in a pipe, or where ``NO_COLOR`` is set."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self._colour = out.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._steps = 0
        self._claims: list[tuple[str, bool]] = []

    def title(self, text: str) -> None:
        """Say what this is all about."""
        self._line(self._paint(_BOLD, text))

    def step(self, text: str) -> None:
        """Begin the next numbered step."""
        self._steps += 1
        self._line("")
        self._line(self._paint(_BOLD, f"{self._steps}. {text}"))

    def say(self, text: str) -> None:
        """Print one line of the step."""
        self._line(INDENT + text)

    def claim(self, text: str, holds: bool) -> None:
        """Print a claim with its outcome, and remember it for the summary."""
        self._claims.append((text, holds))
        self.say(f"{self._verdict(holds)}  {text}")

    def end(self, seconds: float) -> bool:
        """Print the summary and return whether every claim held."""
        failed = [text for text, holds in self._claims if not holds]
        self._line("")
        held = f"{len(self._claims) - len(failed)} of {len(self._claims)} claims held, in {seconds:.0f} s."
        self._line(self._paint(_RED if failed else _GREEN, held))
        for text in failed:
            self.say(f"{self._verdict(False)}  {text}")
        return not failed

    def _verdict(self, holds: bool) -> str:
        return self._paint(_GREEN, "ok    ") if holds else self._paint(_RED, "FAILED")

    def _paint(self, colour: str, text: str) -> str:
        return f"\033[{colour}m{text}\033[0m" if self._colour else text

    def _line(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()
