"""``cloudckpt cp``: a checkpoint, or every step of a run, at another place too."""

from __future__ import annotations

import dataclasses

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.config.uri_hints import advice
from cloudckpt.backends.copy.copy import Copied, copy_checkpoint, ensure_apart
from cloudckpt.backends.errors import CheckpointNotFoundError, ConfigurationError
from cloudckpt.cli import output
from cloudckpt.cli.progress import progress
from cloudckpt.run import Run


def cp(source: Run, destination: Run, step: int | None, *, overwrite: bool, as_json: bool) -> None:
    """Copy one checkpoint, or the steps of a run from the oldest on, and print what came of it.

    Raises:
        CheckpointNotFoundError: nothing is committed at the source.
        CheckpointExistsError: another checkpoint is at the destination.
        ConfigurationError: one place lies in the other, or one is a run and the other a checkpoint.
        IntegrityError: something at the source is damaged.
        StorageError: a store could not be read, or written to; the steps before are copied.
    """
    ensure_apart(source.target, destination.target)
    done: list[Copied] = []
    for one, other in _pairs(source, destination, step):
        copied = _copied(one, other, overwrite=overwrite)
        done.append(copied)
        if not as_json:
            _say(copied)
    if as_json:
        copies = [dataclasses.asdict(one) for one in done]
        output.say_json({"source": source.target.uri, "uri": destination.target.uri, "copies": copies})


def _copied(source: Target, destination: Target, *, overwrite: bool) -> Copied:
    try:
        with progress("copying") as shown:
            return copy_checkpoint(
                source, destination, overwrite=overwrite, observer=shown.done, begun=shown.begun
            )
    except KeyboardInterrupt as error:
        for note in getattr(error, "__notes__", ()):
            output.say(note, console=output.aside())
        raise


def _pairs(source: Run, destination: Run, step: int | None) -> list[tuple[Target, Target]]:
    if step is not None:
        _refuse_checkpoint(destination)
        return [(source.at(step), destination.at(step))]
    if source.is_checkpoint():
        if not destination.is_checkpoint() and (newest := destination.newest()) is not None:
            raise ConfigurationError(
                "the source is one checkpoint, and this is a whole run",
                uri=destination.target.uri,
                hint=f"Say where in it, like {destination.at(newest).uri}",
            )
        return [(source.target, destination.target)]
    steps = source.steps()
    if not steps:
        raise CheckpointNotFoundError(
            "there is no committed checkpoint here, and no run with one",
            uri=source.target.uri,
            hint=advice(source.target.uri, "Check the URI; `cloudckpt ls` shows what is below it"),
        )
    _refuse_checkpoint(destination)
    return [(source.at(one), destination.at(one)) for one in steps]


def _refuse_checkpoint(destination: Run) -> None:
    if destination.is_checkpoint():
        raise ConfigurationError(
            "steps of a run are copied into a run, and this is one checkpoint",
            uri=destination.target.uri,
            hint="Give the URI of a run, or of a new one",
        )


def _say(copied: Copied) -> None:
    what = f"{output.count(copied.objects, 'object')}, {output.size(copied.size)}"
    if copied.was_there:
        output.say(f"{copied.uri} was there already: {what}")
        return
    output.say(f"copied {copied.uri}: {what}", "green")
    there = copied.size - copied.sent - copied.copied_by_store
    ways = (
        (copied.copied_by_store, "copied by the store, and not compared with checksums"),
        (copied.sent, "sent"),
        (there, "there from an earlier try"),
    )
    if ways_used := [f"{output.size(size)} {how}" for size, how in ways if size]:
        output.say(f"  {', '.join(ways_used)}")
