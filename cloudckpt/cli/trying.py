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
    rendezvous: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", show_default=False, help="Where the job's ranks meet."),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=0, show_default=False, help="This process's rank.")] = None,
    world_size: Annotated[
        int | None, typer.Option(min=2, show_default=False, help="Number of ranks.")
    ] = None,
    interface: Annotated[
        str | None,
        typer.Option(show_default=False, help="Interface, address or network between the ranks' hosts."),
    ] = None,
    port_range: Annotated[
        str | None,
        typer.Option(metavar="FIRST-LAST", show_default=False, help="Ports that ranks may listen on."),
    ] = None,
    option: Given = None,
    as_json: Json = False,
) -> None:
    """Try whether a job can checkpoint here, and say what to do where it can't.

    Under torchrun, or with --rendezvous, --rank and --world-size on every host, it also proves that the ranks
    reach each other.
    """
    target, nbytes = target_of(uri, option), None if state_size is None else size_of(state_size)
    ask_for_new_folder(target)

    from cloudckpt.cli.examination import doctor as examine
    from cloudckpt.doctor.network import Rendezvous
    from cloudckpt.executor.network.network_options import NetworkOptions

    end(
        examine(
            target,
            state_size=nbytes,
            ranks=ranks,
            rendezvous=Rendezvous.given(rendezvous, rank, world_size),
            network=NetworkOptions.given(interface, port_range),
            as_json=as_json,
        )
    )


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
