"""``cloudckpt ls``: the checkpoints of a run, at a glance."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from cloudckpt.backends.config.uri_hints import advice
from cloudckpt.backends.errors import CheckpointNotFoundError
from cloudckpt.backends.system.printable import one_line
from cloudckpt.cli import output
from cloudckpt.run import Entry, Run

_STYLES: Final = {"committed": "green", "in progress": "yellow", "set aside": "yellow", "unfinished": "red"}


def ls(run: Run, *, as_json: bool) -> None:
    """Print what is listed of a run.

    Raises:
        CheckpointNotFoundError: there is nothing of a checkpoint.
        StorageError: the store could not be read.
    """
    found = run.listed()
    if not found:
        raise CheckpointNotFoundError(
            "there is no checkpoint here, and nothing of one",
            uri=run.target.uri,
            hint=advice(run.target.uri, "Check the URI"),
        )
    if as_json:
        output.say_json({"uri": run.target.uri, "checkpoints": [as_dict(one) for one in found]})
    else:
        output.answers().print(table(found, name=run.target.uri.rpartition("/")[2]))


def table(entries: Sequence[Entry], name: str = "") -> Table:
    """Return a line for each; ``name`` is of the one that is at the URI itself."""
    made = output.table("step", "state", "size", "objects", "age", right=("step", "size", "objects", "age"))
    for one in entries:
        made.add_row(
            one_line(one.name or name) if one.step is None else str(one.step),
            Text(f"{one.state}, pinned" if one.pinned else one.state, _STYLES[one.state]),
            output.size(one.size),
            f"{one.objects:,}",
            output.age(one.modified),
        )
    return made


def as_dict(entry: Entry) -> dict[str, Any]:
    """Return an entry for machines."""
    return dataclasses.asdict(entry)
