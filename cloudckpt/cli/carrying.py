"""Commands that bring a checkpoint somewhere else: ``cp``, ``convert``."""

from __future__ import annotations

from typing import Annotated

import typer

from cloudckpt.cli.group import FromOption, Given, Json, Step, ToOption, both_targets

commands = typer.Typer()


@commands.command()
def cp(
    source: Annotated[str, typer.Argument(metavar="SRC", show_default=False, help="A checkpoint, or a run.")],
    destination: Annotated[
        str, typer.Argument(metavar="DST", show_default=False, help="Where it should be, too.")
    ],
    *,
    step: Step = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other checkpoints there.")] = False,
    option: Given = None,
    from_option: FromOption = None,
    to_option: ToOption = None,
    as_json: Json = False,
) -> None:
    """Copy a checkpoint, or every step of a run, to any other store; go on where a copy was cut off."""
    one, other = both_targets(source, destination, option, from_option, to_option)

    from cloudckpt.cli.copying import cp as copy
    from cloudckpt.run import Run

    copy(Run(one), Run(other), step, overwrite=overwrite, as_json=as_json)


@commands.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", show_default=False, help="A checkpoint, a run, or a file.")
    ],
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DST",
            show_default=False,
            help="A .pt, .pth, .bin, .ckpt or .safetensors file, a folder for safetensors, or a checkpoint.",
        ),
    ],
    *,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            show_default=False,
            help="checkpoint, torch or safetensors, where the name of DST does not say it.",
        ),
    ] = None,
    key: Annotated[
        str, typer.Option(metavar="PREFIX", show_default=False, help="Take only keys that begin so.")
    ] = "",
    strip: Annotated[
        str, typer.Option(metavar="PREFIX", show_default=False, help="Leave this out where a key begins so.")
    ] = "",
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Of one file in a folder for safetensors.")
    ] = "5GB",
    step: Step = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at DST.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Let SRC run code of its writer, as pickles can.")
    ] = False,
    option: Given = None,
    from_option: FromOption = None,
    to_option: ToOption = None,
    as_json: Json = False,
) -> None:
    """Convert to and from torch.save files and Hugging Face safetensors, in bounded memory."""
    origin, target = both_targets(source, destination, option, from_option, to_option)

    from cloudckpt.cli.conversion import convert as convert_target

    convert_target(
        origin,
        target,
        step=step,
        to=to,
        key=key,
        strip=strip,
        shard_size=shard_size,
        overwrite=overwrite,
        trust=trust,
        as_json=as_json,
    )
