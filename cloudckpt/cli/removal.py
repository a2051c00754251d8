"""``cloudckpt rm``, ``prune`` and ``gc``: each looks first, shows, asks, and then deletes what it showed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import timedelta

from rich.console import Console

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointError, ConfigurationError
from cloudckpt.backends.manage.delete import delete_checkpoint
from cloudckpt.backends.manage.gc import Garbage, collect_garbage
from cloudckpt.backends.system.printable import one_line
from cloudckpt.cli import listing, output
from cloudckpt.retention import Retention, drop, superseded
from cloudckpt.run import Run, is_pinned


def rm(run: Run, step: int | None, *, yes: bool, dry_run: bool, as_json: bool) -> bool:
    """Delete one checkpoint, and tell whether that was wanted after all.

    Raises:
        CheckpointNotFoundError: nothing is committed there.
        ConfigurationError: the URI is a whole run's, and no step is given.
        StorageError: the store could not be read, or not delete.
    """
    target = run.target if step is None else run.at(step)
    if step is None and not run.is_checkpoint() and (newest := run.newest()) is not None:
        raise ConfigurationError(
            "this is a whole run, and rm deletes one checkpoint",
            uri=target.uri,
            hint=f"Say which with --step; the newest is {newest}. `cloudckpt prune` deletes many",
        )
    if is_pinned(target):
        raise CheckpointError("this checkpoint is pinned", uri=target.uri, hint="`cloudckpt unpin` it first")
    names = delete_checkpoint(target, dry_run=True)
    if not dry_run:
        if not output.agreed(f"Delete {target.uri}, {output.count(len(names), 'object')}?", yes=yes):
            return False
        names = delete_checkpoint(target)
    if as_json:
        output.say_json({"uri": target.uri, "dry_run": dry_run, "deleted": names})
    else:
        _say_names(names if dry_run else (), output.answers())
        output.say(f"{_verb(dry_run=dry_run)} {target.uri}, {output.count(len(names), 'object')}")
    return True


def prune(run: Run, retention: Retention, *, yes: bool, dry_run: bool, as_json: bool) -> bool:
    """Delete the superseded steps of a run; returns False if the user refused.

    A step that a process is loading stays.

    Raises:
        StorageError: the store could not list or delete; those deleted before are gone.
    """
    committed = {one.step: one for one in run.listed() if one.state == "committed" and one.step is not None}
    steps = superseded(run, committed, retention)
    gone = [committed[step] for step in steps]
    # The only question is of what was shown: a step that is committed meanwhile changes nothing.
    if gone and not dry_run:
        if not yes:
            output.aside().print(listing.table(gone))
        if not output.agreed(f"Delete {output.count(len(gone), 'step')} of {run.target.uri}?", yes=yes):
            return False
        gone = [committed[step] for step in steps if drop(run, step)]
    size = sum(one.size for one in gone)
    if as_json:
        deleted = [listing.as_dict(one) for one in gone]
        output.say_json({"uri": run.target.uri, "dry_run": dry_run, "deleted": deleted})
        return True
    if gone:
        output.answers().print(listing.table(gone))
    output.say(
        f"{_verb(dry_run=dry_run)} {output.count(len(gone), 'step')} of {len(committed):,}, "
        f"{output.size(size)}"
    )
    return True


def gc(target: Target, older_than: timedelta, *, yes: bool, dry_run: bool, as_json: bool) -> bool:
    """Remove what dead saves left below a target, and tell whether that was wanted after all.

    Raises:
        StorageError: the store could not list or delete.
    """
    found = collect_garbage(target, older_than=older_than, dry_run=dry_run or not yes)
    asking = bool(_names(found)) and not (dry_run or yes)
    if asking:
        _say_garbage(found, output.aside())
        if not output.agreed(f"Delete this below {target.uri}?", yes=yes):
            return False
        found = collect_garbage(target, older_than=older_than)
    if as_json:
        output.say_json({"uri": target.uri, "dry_run": dry_run, **dataclasses.asdict(found)})
        return True
    _say_skipped(found)
    if not _names(found):
        output.say("nothing to collect")
        return True
    if not asking:
        _say_garbage(found, output.answers())
    uploads, objects = output.count(len(found.uploads), "upload"), output.count(len(found.objects), "object")
    output.say(
        f"{_verb(dry_run=dry_run)} {uploads}, {objects} of {output.size(found.size)}, "
        f"{output.count(len(found.traces), 'trace')} of saves"
    )
    return True


def _say_garbage(found: Garbage, console: Console) -> None:
    for title, names in (
        ("uploads", found.uploads),
        ("objects", found.objects),
        ("traces of saves", found.traces),
    ):
        if names:
            output.say(title, console=console)
            _say_names(names, console)


def _say_skipped(found: Garbage) -> None:
    for reason in found.skipped:
        output.say(f"skipped: {one_line(reason)}", console=output.aside())


def _say_names(names: Iterable[str], console: Console) -> None:
    for name in names:
        output.say(f"  {one_line(name)}", console=console)


def _names(found: Garbage) -> tuple[str, ...]:
    return (*found.uploads, *found.objects, *found.traces)


def _verb(*, dry_run: bool) -> str:
    return "would delete" if dry_run else "deleted"
