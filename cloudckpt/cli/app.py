"""The commands, their arguments, and the status that each ends with.

What a command does is imported when it runs: torch takes seconds, which neither help nor completion may.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cloudckpt.backends.errors import CheckpointError, ConfigurationError
from cloudckpt.backends.target import Target, protocol_of
from cloudckpt.backends.version import __version__
from cloudckpt.cli import output
from cloudckpt.cli.arguments import duration, for_each_side, options_of, size_of, steps_or_time

_WANTING, _MISUSED = 1, 2


class _Commands(TyperGroup):
    """Prints an error as what it is, and makes a status of it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CheckpointError as error:
            output.report(error, debug=bool(ctx.params.get("debug")))
            raise typer.Exit(_MISUSED if isinstance(error, ConfigurationError) else _WANTING) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Uri = Annotated[
    str, typer.Argument(metavar="URI", show_default=False, help="A run, or one checkpoint: s3://bucket/run")
]
Step = Annotated[int | None, typer.Option("--step", min=0, show_default=False, help="Which step of a run.")]
Pinned = Annotated[int, typer.Option("--step", min=0, show_default=False, help="Which step.")]
Given = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="NAME=VALUE",
        show_default=False,
        help="An option of the URI, such as endpoint_url; storage_options takes JSON. May be repeated.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted, and delete nothing.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        output.say(__version__)
        raise typer.Exit


@app.callback()
def _cloudckpt(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Look after PyTorch distributed checkpoints on object storage.

    Exit status: 0 done; 1 found wanting (damaged, different, missing, out of reach); 2 misused.
    """


@app.command()
def ls(uri: Uri, option: Given = None, as_json: Json = False) -> None:
    """List the steps of a run: their state, size and age."""
    target = _target(uri, option)

    from cloudckpt.cli.listing import ls as list_run
    from cloudckpt.run import Run

    list_run(Run(target), as_json=as_json)


@app.command()
def show(uri: Uri, step: Step = None, option: Given = None, as_json: Json = False) -> None:
    """Show what a checkpoint holds: by default the newest of a run."""
    target = _target(uri, option)

    from cloudckpt.backends.contents import contents_at
    from cloudckpt.cli.tree import show as show_contents
    from cloudckpt.run import Run

    show_contents(contents_at(Run(target).chosen(step)), as_json=as_json)


@app.command()
def verify(uri: Uri, step: Step = None, option: Given = None, as_json: Json = False) -> None:
    """Read a whole checkpoint and compare it with its checksums."""
    target = _target(uri, option)

    from cloudckpt.cli.verification import verify as verify_target
    from cloudckpt.run import Run

    _end(verify_target(Run(target).chosen(step), as_json=as_json))


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", show_default=False, help="A checkpoint, or a run.")],
    second: Annotated[str, typer.Argument(metavar="B", show_default=False, help="Another one.")],
    option: Given = None,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints by names, shapes and checksums. Of a run it takes the newest."""
    targets = [_target(uri, option) for uri in (first, second)]

    from cloudckpt.backends.contents import contents_at
    from cloudckpt.cli.difference import diff as compare
    from cloudckpt.run import Run

    one, other = (contents_at(Run(target).chosen()) for target in targets)
    _end(compare(one, other, as_json=as_json))


@app.command()
def cp(
    source: Annotated[str, typer.Argument(metavar="SRC", show_default=False, help="A checkpoint, or a run.")],
    destination: Annotated[
        str, typer.Argument(metavar="DST", show_default=False, help="Where it should be, too.")
    ],
    *,
    step: Step = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other checkpoints there.")] = False,
    option: Given = None,
    from_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", show_default=False, help="An option of SRC alone."),
    ] = None,
    to_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", show_default=False, help="An option of DST alone."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a checkpoint, or every step of a run, to any other store; go on where a copy was cut off."""
    protocols = protocol_of(source), protocol_of(destination)
    given = for_each_side(protocols, option or (), from_option or (), to_option or ())
    one, other = Target.parse(source, **given[0]), Target.parse(destination, **given[1])

    from cloudckpt.cli.copying import cp as copy
    from cloudckpt.run import Run

    copy(Run(one), Run(other), step, overwrite=overwrite, as_json=as_json)


@app.command()
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
    target = _target(uri, option)
    output.ensure_can_ask(yes=yes or dry_run)

    from cloudckpt.cli.removal import rm as remove
    from cloudckpt.run import Run

    _end(remove(Run(target), step, yes=yes, dry_run=dry_run, as_json=as_json))


@app.command()
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
    target = _target(uri, option)
    every = None if keep_every is None else steps_or_time(keep_every)
    output.ensure_can_ask(yes=yes or dry_run)

    from cloudckpt.cli.removal import prune as prune_run
    from cloudckpt.retention import Retention
    from cloudckpt.run import Run

    retention = Retention(keep_last, every, keep_best)
    _end(prune_run(Run(target), retention, yes=yes, dry_run=dry_run, as_json=as_json))


@app.command()
def pin(uri: Uri, step: Pinned, option: Given = None, as_json: Json = False) -> None:
    """Keep a step of a run from being pruned."""
    target = _target(uri, option)

    from cloudckpt.run import Run

    Run(target).pin(step)
    _say_pinned(target, step, pinned=True, as_json=as_json)


@app.command()
def unpin(uri: Uri, step: Pinned, option: Given = None, as_json: Json = False) -> None:
    """Leave a step of a run to pruning again."""
    target = _target(uri, option)

    from cloudckpt.run import Run

    Run(target).unpin(step)
    _say_pinned(target, step, pinned=False, as_json=as_json)


@app.command()
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
    target, bound = _target(uri, option), duration(older_than)
    output.ensure_can_ask(yes=yes or dry_run)

    from cloudckpt.cli.removal import gc as collect

    _end(collect(target, bound, yes=yes, dry_run=dry_run, as_json=as_json))


@app.command()
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
    target, nbytes = _target(uri, option), None if state_size is None else size_of(state_size)

    from cloudckpt.cli.examination import doctor as examine

    _end(examine(target, state_size=nbytes, ranks=ranks, as_json=as_json))


@app.command()
def bench(
    uri: Uri,
    *,
    size: Annotated[str, typer.Option(metavar="SIZE", help="What is moved at a time.")] = "256MiB",
    seconds: Annotated[float, typer.Option(min=0, help="How long it measures, about.")] = 60.0,
    option: Given = None,
    as_json: Json = False,
) -> None:
    """Measure how fast this machine reaches a store, and which options are fastest."""
    target, nbytes = _target(uri, option), size_of(size)

    from cloudckpt.cli.speed import bench as measure

    _end(measure(target, size=nbytes, seconds=seconds, as_json=as_json))


def _target(uri: str, option: list[str] | None) -> Target:
    return Target.parse(uri, **options_of(option or ()))


def _say_pinned(target: Target, step: int, *, pinned: bool, as_json: bool) -> None:
    if as_json:
        output.say_json({"uri": target.uri, "step": step, "pinned": pinned})
    else:
        output.say(f"step {step} of {target.uri} is {'pinned' if pinned else 'not pinned'}")


def _end(good: bool) -> None:
    """End with a status where what was found is wanting."""
    if not good:
        raise typer.Exit(_WANTING)
