"""Commands that try a place: ``doctor``, ``bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from cloudckpt.cli.arguments import size_of
from cloudckpt.cli.group import Given, Json, Uri, ask_for_new_folder, end, target_of

commands = typer.Typer()


@commands.command()
def doctor(
    uri: Uri,
    *,
    state_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", show_default=False, help="A rank's state, such as 10GiB: for memory."),
    ] = None,
    ranks: Annotated[int, typer.Option("--ranks-per-host", min=1, help="Ranks on this machine.")] = 1,
    option: Given = None,
    as_json: Json = False,
) -> None:
    """Try whether a job can checkpoint here, and say what to do where it can't."""
    target, nbytes = target_of(uri, option), None if state_size is None else size_of(state_size)
    ask_for_new_folder(target)

    from cloudckpt.cli.examination import doctor as examine

    end(examine(target, state_size=nbytes, ranks=ranks, as_json=as_json))


@commands.command()
def bench(
    uri: Uri,
    *,
    size: Annotated[str, typer.Option(metavar="SIZE", help="What is moved at a time.")] = "256MiB",
    seconds: Annotated[float, typer.Option(min=0, help="How long it measures, about.")] = 60.0,
    option: Given = None,
    as_json: Json = False,
) -> None:
    """Measure how fast this machine reaches a store, and which options are fastest."""
    target, nbytes = target_of(uri, option), size_of(size)
    ask_for_new_folder(target)

    from cloudckpt.cli.speed import bench as measure

    end(measure(target, size=nbytes, seconds=seconds, as_json=as_json))
