"""The application with all of its commands, in the order in which help shows them.

What a command does is imported when it runs: torch takes seconds, which neither help nor completion may.
"""

from __future__ import annotations

from cloudckpt.cli import carrying, deleting, looking, trying
from cloudckpt.cli.group import app

__all__ = ["app"]

for group in (looking, carrying, deleting, trying):
    app.add_typer(group.commands)
