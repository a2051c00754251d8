"""``cloudckpt verify``: every byte of a checkpoint compared, every value proven loadable."""

from __future__ import annotations

import dataclasses
from itertools import groupby

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.manage import verify as library
from cloudckpt.backends.manage.verify import Damage, Verification
from cloudckpt.backends.system.printable import one_line
from cloudckpt.cli import output
from cloudckpt.cli.progress import progress


def verify(target: Target, *, as_json: bool) -> bool:
    """Verify a checkpoint, print what was found, and tell whether it is sound.

    Raises:
        CheckpointNotFoundError: nothing is committed there.
        UnsafeCheckpointError: reading its metadata would run code.
        StorageError: the store could not be read.
    """
    with progress("verifying") as shown:
        found = library.verify(target, observer=shown.done, begun=shown.begun)
    if as_json:
        output.say_json({**dataclasses.asdict(found), "ok": found.ok})
    else:
        _say(found)
    return found.ok


def where(damage: Damage) -> str:
    """Return the item and the bytes of an object that are damaged, as far as they are known."""
    places = [f"item {damage.item!r}"] if damage.item is not None else []
    if damage.offset is not None and damage.stop is not None:
        places.append(f"bytes {damage.offset:,} to {damage.stop:,}")
    elif damage.offset is not None:
        places.append(f"from byte {damage.offset:,}")
    return ", ".join(places)


def _say(found: Verification) -> None:
    output.say(found.uri, "bold")
    compared = (
        f"{output.count(found.objects, 'object')}, {output.count(found.items, 'item')}, "
        f"{output.size(found.size)} compared"
    )
    if not found.damages:
        output.say(f"not damaged: {compared}", "green")
    else:
        output.say(f"damaged in {output.count(len(found.damages), 'place')}: {compared}", "red")
    if found.unverified:
        output.say(
            f"{output.count(found.unverified, 'item')} without checksums, as another writer than cloudckpt "
            "leaves them: of their objects only the sizes were looked at"
        )
    damages = sorted(found.damages, key=lambda one: (one.object_name, one.offset or 0, one.item or ""))
    for name, group in groupby(damages, key=lambda one: one.object_name):
        output.say(one_line(name))
        for one in group:
            place = where(one)
            output.say(f"  {place}: {one.problem}" if place else f"  {one.problem}")
    _say_values(found)


def _say_values(found: Verification) -> None:
    if found.unloadable:
        output.say(f"not loadable without trust: {output.count(len(found.unloadable), 'value')}", "red")
        for value in found.unloadable:
            output.say(f"  {one_line(str(value))}")
    if found.imports:
        output.say(f"to be imported before a load: {one_line(', '.join(found.imports))}")
    if found.unproven:
        output.say(
            f"{output.count(found.unproven, 'value')} too large to be loaded within memory_limit: only their "
            "bytes were compared"
        )
