"""Commands about what stays: ``rm``, ``prune``, ``pin``, ``unpin``, ``gc``."""

from __future__ import annotations

from typing import Annotated

import typer

from cloudckpt.backends.config.target import Target
from cloudckpt.cli import output
from cloudckpt.cli.arguments import duration, steps_or_time
from cloudckpt.cli.group import DryRun, Given, Json, Pinned, Step, Uri, Yes, end, refuse_new_folder, target_of

commands = typer.Typer()


@commands.command()
def rm(
    uri: Uri,
    *,
    step: Step = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    option: Given = None,
    as_json: Json = False,
) -> None:
    """Delete one checkpoint."""
    target = target_of(uri, option)
    output.ensure_can_ask(yes=yes or dry_run)

    from cloudckpt.cli.removal import rm as remove
    from cloudckpt.run import Run

    end(remove(Run(target), step, yes=yes, dry_run=dry_run, as_json=as_json))


@commands.command()
def prune(
    uri: Uri,
    *,
    keep_last: Annotated[int, typer.Option(min=1, show_default=False, help="Newest steps to keep.")],
    keep_every: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS|TIME",
            show_default=False,
            help="Multiples of it stay, too; or of a time, such as 6h, one in each.",
        ),
    ] = None,
    keep_best: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="Steps with the highest metric stay, too.")
    ] = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    option: Given = None,
    as_json: Json = False,
) -> None:
    """Delete the older steps of a run."""
    target = target_of(uri, option)
    refuse_new_folder(target)
    every = None if keep_every is None else steps_or_time(keep_every)
    output.ensure_can_ask(yes=yes or dry_run)

    from cloudckpt.cli.removal import prune as prune_run
    from cloudckpt.retention import Retention
    from cloudckpt.run import Run

    retention = Retention(keep_last, every, keep_best)
    end(prune_run(Run(target), retention, yes=yes, dry_run=dry_run, as_json=as_json))


@commands.command()
def pin(uri: Uri, step: Pinned, option: Given = None, as_json: Json = False) -> None:
    """Keep a step of a run from being pruned."""
    target = target_of(uri, option)
    refuse_new_folder(target)

    from cloudckpt.run import Run

    Run(target).pin(step)
    _say_pinned(target, step, pinned=True, as_json=as_json)


@commands.command()
def unpin(uri: Uri, step: Pinned, option: Given = None, as_json: Json = False) -> None:
    """Leave a step of a run to pruning again."""
    target = target_of(uri, option)

    from cloudckpt.run import Run

    Run(target).unpin(step)
    _say_pinned(target, step, pinned=False, as_json=as_json)


@commands.command()
def gc(
    uri: Uri,
    *,
    older_than: Annotated[
        str, typer.Option(metavar="TIME", help="What is younger stays: 90s, 30m, 12h, 1d.")
    ] = "1d",
    yes: Yes = False,
    dry_run: DryRun = False,
    option: Given = None,
    as_json: Json = False,
) -> None:
    """Remove what saves that died left behind, and nothing of a save in progress."""
    target, bound = target_of(uri, option), duration(older_than)
    refuse_new_folder(target)
    output.ensure_can_ask(yes=yes or dry_run)

    from cloudckpt.cli.removal import gc as collect

    end(collect(target, bound, yes=yes, dry_run=dry_run, as_json=as_json))


def _say_pinned(target: Target, step: int, *, pinned: bool, as_json: bool) -> None:
    if as_json:
        output.say_json({"uri": target.uri, "step": step, "pinned": pinned})
    else:
        output.say(f"step {step} of {target.uri} is {'pinned' if pinned else 'not pinned'}")
