"""A run: checkpoints of one training job, each in a folder named for its step.

A step exists when its ``.metadata`` does; nothing else decides. Names have ten digits, so that they sort as
the steps do.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.config.uri_hints import advice
from cloudckpt.backends.copy.journal import JOURNAL
from cloudckpt.backends.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    IntegrityError,
    ObjectNotFoundError,
    UnsafeCheckpointError,
)
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.format.committed import listed_metadata
from cloudckpt.backends.load.read_lease import READ_LEASE, is_read
from cloudckpt.backends.manage.set_aside import ASIDE, set_aside
from cloudckpt.backends.save.save_lease import MARKER, SILENT_FOR, is_silent, silent_since
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import ObjectInfo, ObjectStore, Overwrite
from cloudckpt.backends.stores.object_names import PIN, STEP_DIGITS, STEP_PREFIX, probe_name
from cloudckpt.backends.transfer.task_pool import run_all

_FOLDER = re.compile(rf"{STEP_PREFIX}([0-9]{{{STEP_DIGITS}}})/?")
_TRACE = re.compile("|".join(one.pattern for one in (MARKER, JOURNAL, READ_LEASE, ASIDE)))
"""Hidden objects of saves, copies, loads and checkpoints that were set aside."""
_LAST = 10**STEP_DIGITS - 1

_MOST_NOTES = 1000
_notes: dict[tuple[str, str, str | None], dict[str, float]] = {}
"""What was noted of steps, by the version of their metadata."""

State = Literal["committed", "in progress", "set aside", "unfinished"]
"""Of a checkpoint: its metadata is there; a save writes it; its metadata was set aside; a save of it died."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint of a listing."""

    name: str
    """Its folder's, below the run; empty where the URI is the checkpoint's own."""
    step: int | None
    """None where the folder is not named for a step."""
    state: State
    size: int
    """Bytes of the data objects there, those that a dead save left included."""
    objects: int
    """How many there are."""
    modified: datetime | None
    """When it was committed; of one that was not, when something was last put there."""
    pinned: bool = False
    """Whether retention leaves it alone."""
    loading: bool = False
    """True while a process holds a read lease on it."""
    set_aside: datetime | None = None
    """When the oldest checkpoint that was set aside in its folder was."""


@dataclass(frozen=True, slots=True)
class Run:
    """The checkpoints below one URI. Every question is answered by the store, now."""

    target: Target

    def at(self, step: int) -> Target:
        """Return the address of a step's checkpoint.

        Raises:
            ConfigurationError: no step has this number.
        """
        return self.target.child(self.folder(step))

    def number(self, step: Any) -> int:
        """Return a step as an int, from any type of whole number: numpy and torch have their own.

        Raises:
            ConfigurationError: no step has this number.
        """
        try:
            number = -1 if isinstance(step, bool) else operator.index(step)
        except TypeError:
            number = -1
        if not 0 <= number <= _LAST:
            raise ConfigurationError(
                f"a step is a whole number from 0 to {_LAST:,}, and not {step!r}", uri=self.target.uri
            )
        return number

    def folder(self, step: int) -> str:
        """Return the name of a step's folder.

        Raises:
            ConfigurationError: no step has this number.
        """
        return f"{STEP_PREFIX}{self.number(step):0{STEP_DIGITS}}"

    def newest(self, before: int | None = None) -> int | None:
        """Return the highest committed step, below ``before`` where that is given; None where there is none.

        It takes a request for a thousand steps, and one for each step that is started and not committed.

        Raises:
            StorageError: the store could not be read.
        """
        with open_store(self.target) as store:
            for step in reversed(_folders(store)):
                if (before is None or step < before) and self._is_committed(store, step):
                    return step
        return None

    def steps(self) -> list[int]:
        """Every committed step, in order; it takes a request for a thousand objects.

        Raises:
            StorageError: the store could not be read.
        """
        return [number for number, one in self.started().items() if one.state == "committed"]

    def started(self) -> dict[int, Entry]:
        """Every step that has a folder, committed or not, in order; a request for a thousand objects.

        Raises:
            StorageError: the store could not be read.
        """
        with open_store(self.target) as store:
            objects = store.list(STEP_PREFIX).objects
        found = entries(objects, silent_since(), "")
        return {one.step: one for one in found if one.step is not None}

    def is_committed(self, step: int) -> bool:
        """Return True if a step is committed.

        Raises:
            StorageError: the store could not be read.
        """
        with open_store(self.target) as store:
            return self._is_committed(store, step)

    def among(self, steps: Collection[int]) -> set[int]:
        """Return those of some steps that are committed, by a plain read of each.

        Raises:
            StorageError: the store could not be read.
        """
        with open_store(self.target) as store:
            looks = [partial(self._is_committed, store, one) for one in steps]
            committed = run_all(looks, self.target.options.concurrency)
        return {one for one, there in zip(steps, committed, strict=True) if there}

    def newer(self, step: int) -> list[int]:
        """Return the committed steps above ``step``, in order.

        It takes a request for a thousand steps, and one for each above.

        Raises:
            StorageError: the store could not be read.
        """
        return sorted(self.among([one for one in self.folders() if one > step]))

    def folders(self) -> list[int]:
        """Return the steps that have a folder, committed or not, in order; a request for a thousand.

        Raises:
            StorageError: the store could not be read.
        """
        with open_store(self.target) as store:
            return _folders(store)

    def set_aside(self, step: int) -> bool:
        """Withdraw a committed step from readers, keep its objects, and free its number.

        Returns:
            False if the step is not committed.

        Raises:
            StorageError: the store could not be read or written.
        """
        with open_store(self.at(step)) as store:
            return set_aside(store)

    def roll_back(self, step: int) -> list[int]:
        """Make a committed step the newest, and return the newer ones, which are set aside.

        They are set aside in order, the newest last: until then the newest step is the one of before.

        Raises:
            CheckpointNotFoundError: the step is not committed.
            StorageError: the store could not be read or written. The newest step is the one of before.
        """
        if not self.is_committed(step):
            raise CheckpointNotFoundError(
                "there is no committed checkpoint to go back to", uri=self.at(step).uri, hint="Check the step"
            )
        newer = self.newer(step)
        for one in newer:
            self.set_aside(one)
        return newer

    def pin(self, step: int) -> None:
        """Keep retention from a committed step.

        Raises:
            CheckpointNotFoundError: it is not committed.
            StorageError: the store could not be read or written.
        """
        name = f"{self.folder(step)}/{PIN}"
        with open_store(self.target) as store:
            if not self._is_committed(store, step):
                raise CheckpointNotFoundError(
                    "there is no committed checkpoint to pin", uri=self.at(step).uri, hint="Check the step"
                )
            store.put(name, b"kept from retention\n", Overwrite())

    def unpin(self, step: int) -> None:
        """Leave a step to retention again; one that is not pinned stays as it is.

        Raises:
            StorageError: the store could not delete.
        """
        with open_store(self.at(step)) as store:
            store.delete([PIN])

    def listed(self, silent_for: timedelta = SILENT_FOR) -> list[Entry]:
        """Every checkpoint below the URI, or the one at it, committed or not: steps in order, then others.

        It takes a request for a thousand objects. A save counts as dead once its marker is older than
        ``silent_for``. Folders of folders are not looked into.

        Raises:
            StorageError: the store could not be read.
        """
        with open_store(self.target) as store:
            objects = store.list().objects
        return entries(objects, datetime.now(UTC) - silent_for, _name_of(self.target))

    def chosen(self, step: int | None = None) -> Target:
        """Return the address of a step's checkpoint; without a step, the URI's own, or the newest step's.

        Raises:
            CheckpointNotFoundError: the URI is neither a checkpoint nor a run with a committed step.
            StorageError: the store could not be read.
        """
        if step is not None:
            return self.at(step)
        if self.is_checkpoint():
            return self.target
        newest = self.newest()
        if newest is None:
            raise CheckpointNotFoundError(
                "there is no committed checkpoint here, and no run with one",
                uri=self.target.uri,
                hint=advice(self.target.uri, "Check the URI; `cloudckpt ls` shows what is below it"),
            )
        return self.at(newest)

    def is_checkpoint(self) -> bool:
        """Return True if the URI is a committed checkpoint's own, and not a run's.

        Raises:
            StorageError: the store could not be read.
        """
        with open_store(self.target) as store:
            return bool(listed_metadata(store))

    def note(self, step: int, name: str) -> float | None:
        """Return a number that was saved in a step's metadata; None where there is none, or it can't be read.

        Metadata that was read before is not read again while the store reports the same version.

        Raises:
            StorageError: the store could not be read.
        """
        at = f"{self.folder(step)}/{md.METADATA_NAME}"
        with open_store(self.target) as store:
            try:
                known = (store.uri, at, store.stat(at).version)
                if known not in _notes:
                    _notes[known] = md.notes_of(md.load(store.get(at)[0], uri=store.uri, name=at))
                    while len(_notes) > _MOST_NOTES:
                        del _notes[next(iter(_notes))]
                return _notes[known].get(name)
            except (ObjectNotFoundError, IntegrityError, UnsafeCheckpointError):
                return None

    def prove(self) -> None:
        """Put, read and delete a small object: what a save will need.

        Raises:
            StorageError: one of them is not possible.
        """
        name, data = probe_name(), b"can this run be saved here?"
        with open_store(self.target) as store:
            store.put(name, data, Overwrite())
            try:
                store.get(name)
            finally:
                store.delete([name])

    def _is_committed(self, store: ObjectStore, step: int) -> bool:
        return store.holds(f"{self.folder(step)}/{md.METADATA_NAME}")


def is_pinned(target: Target) -> bool:
    """Return True if a checkpoint is pinned.

    Raises:
        StorageError: the store could not be read.
    """
    with open_store(target) as store:
        return store.holds(PIN)


def _folders(store: ObjectStore) -> list[int]:
    """Return the steps that have a folder, in order."""
    steps = map(_step_of, store.list(STEP_PREFIX, delimiter=True).prefixes)
    return sorted(step for step in steps if step is not None)


def _step_of(folder: str) -> int | None:
    match = _FOLDER.fullmatch(folder)
    return None if match is None else int(match[1])


def entries(objects: Iterable[ObjectInfo], alive: datetime, name: str) -> list[Entry]:
    """Return the checkpoints of a listing: that at its root, called ``name``, or those in its folders.

    A marker that was renewed after ``alive`` is one of a save in progress.
    """
    folders: defaultdict[str, list[ObjectInfo]] = defaultdict(list)
    for info in objects:
        folder, _, rest = info.name.rpartition("/")
        hidden = rest == PIN or _TRACE.fullmatch(rest)
        if "/" not in folder and (md.is_metadata(rest) or _is_data(rest) or hidden):
            folders[folder].append(info)
    if "" in folders:
        return [_entry("", _step_of(name), folders[""], alive)]
    found = [_entry(folder, _step_of(folder), infos, alive) for folder, infos in folders.items()]
    return sorted(found, key=lambda one: (one.step is None, one.step or 0, one.name))


def _entry(folder: str, step: int | None, infos: list[ObjectInfo], alive: datetime) -> Entry:
    names = {info.name.rpartition("/")[2]: info for info in infos}
    # Of a step the metadata of all ranks decides; elsewhere ranks may have saved without each other.
    commits = [info for name, info in names.items() if name == md.METADATA_NAME]
    if not commits and step is None:
        commits = [info for name, info in names.items() if md.is_metadata(name)]
    data = [info for name, info in names.items() if _is_data(name)]
    busy = any(MARKER.fullmatch(name) and not is_silent(info, alive) for name, info in names.items())
    times = [info.modified for info in commits or infos if info.modified is not None]
    asides = [info.modified for name, info in names.items() if ASIDE.fullmatch(name)]
    return Entry(
        folder,
        step,
        "committed" if commits else "in progress" if busy else "set aside" if asides else "unfinished",
        sum(info.size for info in data),
        len(data),
        max(times, default=None),
        PIN in names,
        is_read(infos, alive),
        min((at for at in asides if at is not None), default=None),
    )


def _is_data(name: str) -> bool:
    return name.startswith(md.DATA_PREFIX) and name.endswith(md.DATA_SUFFIX)


def _name_of(target: Target) -> str:
    return target.path.rstrip("/").rpartition("/")[2]
