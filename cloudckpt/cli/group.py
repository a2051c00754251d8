"""Common parts of all commands: the application, shared arguments, and the exit codes."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cloudckpt.backends.config import uri_hints
from cloudckpt.backends.config.target import Target, protocol_of
from cloudckpt.backends.errors import CheckpointError, CheckpointNotFoundError, ConfigurationError
from cloudckpt.backends.version import __version__
from cloudckpt.cli import output
from cloudckpt.cli.arguments import for_each_side, options_of

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
FromOption = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", show_default=False, help="An option of SRC alone.")
]
ToOption = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", show_default=False, help="An option of DST alone.")
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

    Exit status: 0 done; 1 a check failed (damaged, different, missing, unreachable); 2 wrong usage.
    """


def target_of(uri: str, option: list[str] | None) -> Target:
    """Return the target of a command, with the options that it was given."""
    return Target.parse(uri, **options_of(option or ()))


def both_targets(
    source: str,
    destination: str,
    option: list[str] | None,
    from_option: list[str] | None,
    to_option: list[str] | None,
) -> tuple[Target, Target]:
    """Return the targets of a command from one to another."""
    protocols = protocol_of(source), protocol_of(destination)
    given = for_each_side(protocols, option or (), from_option or (), to_option or ())
    one, other = Target.parse(source, **given[0]), Target.parse(destination, **given[1])
    ask_for_new_folder(other)
    return one, other


def refuse_new_folder(target: Target) -> None:
    """Refuse a relative path that looks like a bucket where no such folder exists: there is nothing to do.

    Raises:
        CheckpointNotFoundError: with the URI that was probably meant.
    """
    if uri_hints.new_folder(target.typed) is not None:
        raise CheckpointNotFoundError(
            "there is no such folder", uri=target.uri, hint=uri_hints.advice(target.uri, "Check the URI")
        )


def ask_for_new_folder(target: Target) -> None:
    """Ask on a terminal whether a path that looks like a bucket is meant as a folder; elsewhere log it."""
    folder = uri_hints.new_folder(target.typed)
    if folder is None or not output.can_ask():
        uri_hints.warn_of_new_folder(target.typed)
    elif not output.agreed(
        f"There is no folder {folder}. Make it, instead of writing to s3://{target.typed}?",
        yes=False,
        otherwise="nothing was written",
    ):
        raise typer.Exit(_WANTING)


def end(good: bool) -> None:
    """End with a status where what was found is wanting."""
    if not good:
        raise typer.Exit(_WANTING)
