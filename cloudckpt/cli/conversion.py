"""``cloudckpt convert``: a checkpoint into a file that others read, or the other way round."""

from __future__ import annotations

import dataclasses

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.convert import convert as library
from cloudckpt.backends.convert.convert import Conversion
from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.system.printable import one_line
from cloudckpt.cli import output
from cloudckpt.cli.progress import progress
from cloudckpt.run import Run


def convert(
    source: Target,
    destination: Target,
    *,
    step: int | None,
    to: str | None,
    key: str,
    strip: str,
    shard_size: str,
    overwrite: bool,
    trust: bool,
    as_json: bool,
) -> None:
    """Convert one checkpoint or file, and print what was written. Of a run it takes a step, or the newest.

    Raises:
        CheckpointError: nothing of it is visible.
    """
    if library.kind_at(source) == "checkpoint":
        source = Run(source).chosen(step)
    elif step is not None:
        raise ConfigurationError("this is no run, and has no steps", uri=source.uri, hint="Leave --step out")
    with progress("converting") as shown:
        done = library.convert(
            source,
            destination,
            to=to,
            key=key,
            strip=strip,
            shard_size=shard_size,
            overwrite=overwrite,
            trust=trust,
            observer=shown.done,
            begun=shown.begun,
        )
    if as_json:
        output.say_json(dataclasses.asdict(done))
    else:
        _say(done)


def _say(done: Conversion) -> None:
    output.say(done.uri, "bold")
    values = f", {output.count(done.values, 'value')}" if done.kind != "safetensors" else ""
    output.say(
        f"{output.count(done.tensors, 'tensor')}{values} of {done.source}: {output.size(done.size)}", "green"
    )
    if done.kind == "safetensors":
        for uri in done.files:
            if uri != done.uri:
                output.say(f"  {uri.rpartition('/')[2]}")
    if done.left_out:
        output.say(f"left out, for safetensors hold tensors alone: {len(done.left_out):,}", "yellow")
        for key in done.left_out:
            output.say(f"  {one_line(key)}")
