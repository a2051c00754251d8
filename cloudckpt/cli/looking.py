"""Commands that look at checkpoints: ``ls``, ``show``, ``verify``, ``diff``."""

from __future__ import annotations

from typing import Annotated

import typer

from cloudckpt.cli.group import Given, Json, Step, Uri, end, target_of

commands = typer.Typer()


@commands.command()
def ls(uri: Uri, option: Given = None, as_json: Json = False) -> None:
    """List the steps of a run: their state, size and age."""
    target = target_of(uri, option)

    from cloudckpt.cli.listing import ls as list_run
    from cloudckpt.run import Run

    list_run(Run(target), as_json=as_json)


@commands.command()
def show(uri: Uri, step: Step = None, option: Given = None, as_json: Json = False) -> None:
    """Show what a checkpoint holds: by default the newest of a run."""
    target = target_of(uri, option)

    from cloudckpt.backends.manage.contents import contents_at
    from cloudckpt.cli.tree import show as show_contents
    from cloudckpt.run import Run

    show_contents(contents_at(Run(target).chosen(step)), as_json=as_json)


@commands.command()
def verify(uri: Uri, step: Step = None, option: Given = None, as_json: Json = False) -> None:
    """Read a whole checkpoint and compare it with its checksums."""
    target = target_of(uri, option)

    from cloudckpt.cli.verification import verify as verify_target
    from cloudckpt.run import Run

    end(verify_target(Run(target).chosen(step), as_json=as_json))


@commands.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", show_default=False, help="A checkpoint, or a run.")],
    second: Annotated[str, typer.Argument(metavar="B", show_default=False, help="Another one.")],
    option: Given = None,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints by names, shapes and checksums. Of a run it takes the newest."""
    targets = [target_of(uri, option) for uri in (first, second)]

    from cloudckpt.backends.manage.contents import contents_at
    from cloudckpt.cli.difference import diff as compare
    from cloudckpt.run import Run

    one, other = (contents_at(Run(target).chosen()) for target in targets)
    end(compare(one, other, as_json=as_json))
