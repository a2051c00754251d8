"""Pictures of the command line for the docs: what real commands print on a real terminal.

``python -m bench.terminal`` has ``ls`` and ``show`` look at a run and ``doctor`` at a bucket, and draws that.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

import cloudckpt
from support.commands import COLUMNS, on_a_terminal
from support.servers import moto_server

DOCS = Path(__file__).parents[2] / "docs"
STATE_SIZE = "10GiB"


def main() -> None:
    with moto_server() as server, _environment(server.environment), tempfile.TemporaryDirectory() as folder:
        uri = f"{folder}/run"
        _train(uri)
        bucket = server.new_bucket()
        _draw("ls", uri, "ls", uri)
        _draw("show", uri, "show", uri)
        _draw("doctor", bucket, "doctor", f"s3://{bucket}/run", "--state-size", STATE_SIZE)


def _train(uri: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.ReLU(), torch.nn.Linear(200, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(8, 300)).square().mean().backward()
    optimizer.step()
    with cloudckpt.Checkpointer(uri) as checkpointer:
        for step in (100, 200, 300, 400):
            checkpointer.save(step, {"model": model, "optimizer": optimizer, "epoch": step // 100})
        checkpointer.pin(100)
    Path(uri, "step-0000000300", ".metadata").unlink()  # as a save leaves it that died before its commit


def _draw(name: str, place: str, *arguments: str) -> None:
    """Have a command print on a terminal, and draw that, with the place under the name that docs give it."""
    ran = on_a_terminal(*arguments)
    shown = "s3://training" if name == "doctor" else "/tmp/run"  # noqa: S108 - a name to show
    printed = ran.out.replace(f"s3://{place}", shown).replace(place, shown.removeprefix("s3://"))
    typed = " ".join(arguments)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    command = f"$ cloudckpt {typed}".replace(f"s3://{place}", shown).replace(place, shown)
    console.print(command, highlight=False)
    console.print(Text.from_ansi(printed))
    drawn = console.export_svg(title=f"cloudckpt {name}")
    # rich names fonts on other hosts, which a picture in a repository should not ask for anything.
    (DOCS / f"cli-{name}.svg").write_text(re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL))


@contextlib.contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ |= more
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


if __name__ == "__main__":
    main()
