"""Copying a checkpoint from one store to another: whole or not there at all, and gone on with when cut off.

Data objects first, then ``.metadata``, by the same conditional put that ends a save. A journal at the
destination says how far a copy is. See ``docs/design/0020-copies.md``.
"""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.copy.copied_objects import ensure_there, held_of, is_same
from cloudckpt.backends.copy.copy_workers import Relay
from cloudckpt.backends.copy.journal import JOURNAL_NAME, CopyJournal, Entry, gave_way, give_up, read_journal
from cloudckpt.backends.copy.object_copy import Original, is_unique
from cloudckpt.backends.copy.source import Checkpoint, read_checkpoint
from cloudckpt.backends.errors import (
    CheckpointError,
    CheckpointExistsError,
    ConfigurationError,
    ObjectNotFoundError,
    StorageError,
    UncertainCommitError,
)
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.format.committed import listed_metadata
from cloudckpt.backends.save import commit, object_layout
from cloudckpt.backends.save.commit import Previous
from cloudckpt.backends.save.save_lease import SaveLease, marker_name
from cloudckpt.backends.save.uploader import Observer
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import ObjectInfo, ObjectStore, Upload
from cloudckpt.backends.system import background_log

_log = background_log.logger(__name__)


@dataclass(frozen=True, slots=True)
class Copied:
    """The result of a copy."""

    source: str
    uri: str
    """Where it is now."""
    objects: int
    """Data objects that it consists of."""
    size: int
    """Bytes of these."""
    sent: int = 0
    """Bytes that were read here and sent on, this time."""
    copied_by_store: int = 0
    """Bytes that the store copied itself, this time: they were not compared with their checksums."""
    was_there: bool = False
    """Whether all of it had been committed before, so that nothing was done."""


def copy_checkpoint(
    source: str | os.PathLike[str] | Target,
    destination: str | os.PathLike[str] | Target,
    *,
    overwrite: bool = False,
    observer: Observer | None = None,
    begun: Callable[[int], None] | None = None,
    source_options: Mapping[str, Any] | None = None,
    destination_options: Mapping[str, Any] | None = None,
) -> Copied:
    """Copy the committed checkpoint at ``source``, ours or stock, so that it is at ``destination`` as it is.

    Within one store, the store copies; elsewhere the bytes go through here, compared with their checksums on
    the way, ``concurrency`` parts at a time and at most ``memory_limit`` bytes. When it fails or is killed,
    what has arrived stays, invisible, and the same copy goes on from there; ``collect_garbage`` removes it.

    Args:
        source: one checkpoint.
        destination: where it should be, too.
        overwrite: replace another checkpoint there. It stays whole until the new one is.
        observer: called with an object's name and how many more of its bytes have arrived, from the threads
            that copy.
        begun: called with the number of bytes to be copied.
        source_options: keywords for the source.
        destination_options: keywords for the destination.

    Raises:
        CheckpointNotFoundError: nothing is committed at ``source``.
        CheckpointExistsError: another checkpoint is at ``destination``, or was committed there meanwhile.
        ConfigurationError: one place lies in the other.
        IntegrityError: something at the source is missing or damaged; the object, the item and the bytes.
        UnsafeCheckpointError: its metadata would run code, or names what is no object of a checkpoint.
        CommitError: the commit failed, or another copy took over.
        UncertainCommitError: no answer tells whether the commit happened.
        StorageError: a store could not be read, or written to.
    """
    one = Target.parse(source, **(source_options or {}))
    other = Target.parse(destination, **(destination_options or {}))
    ensure_apart(one, other)
    with open_store(one) as here, open_store(other) as there:
        return _Copy((one, here), (other, there), observer, begun).run(overwrite=overwrite)


def ensure_apart(source: Target, destination: Target) -> None:
    """Make sure that neither place lies in the other.

    Raises:
        ConfigurationError: one does.
    """
    apart = source.protocol != destination.protocol or source.bucket != destination.bucket
    if apart or source.options.endpoint_url != destination.options.endpoint_url:
        return
    paths = [source.path, destination.path]
    if source.protocol == "file":
        paths = [os.path.realpath(path) for path in paths]
    first, second = (f"{path.rstrip('/')}/" for path in paths)
    if first.startswith(second) or second.startswith(first) or "/" in (first, second):
        raise ConfigurationError(
            "a checkpoint is copied to another place, and neither may lie in the other",
            uri=destination.uri,
            hint=f"The source is {source.uri}",
        )


class _Copy:
    """One copy."""

    def __init__(
        self,
        source: tuple[Target, ObjectStore],
        destination: tuple[Target, ObjectStore],
        observer: Observer | None,
        begun: Callable[[int], None] | None,
    ) -> None:
        self._one, self._source = source
        self._other, self._destination = destination
        self._observer = observer
        self._begun = begun
        self._copy_id = uuid.uuid4().hex
        self._reused: set[str] = set()
        """Objects that an earlier copy left at the destination."""

    def run(self, *, overwrite: bool) -> Copied:
        checkpoint = read_checkpoint(self._source)
        existing = _existing(self._destination)
        if _is_there(checkpoint, existing):
            self._clear_away(checkpoint.digest)
            return self._found(checkpoint)
        _check_replaceable(self._destination.uri, checkpoint, existing, overwrite=overwrite)
        object_layout.check_part_size(
            self._other.options, self._destination.part_limits, self._destination.uri
        )
        _ = self._destination.capabilities  # found out now, not when all bytes are sent
        originals = checkpoint.sized(self._source, self._one.options.concurrency)
        marker = SaveLease(self._destination, self._copy_id, 0)
        journal: CopyJournal | None = None
        try:
            journal = CopyJournal(self._destination, self._copy_id, checkpoint.digest)
            # Another copy may have committed before it noticed this one. It won't later.
            existing = _existing(self._destination)
            if _is_there(checkpoint, existing):
                journal.end()
                marker.end()
                return self._found(checkpoint)
            try:
                _check_replaceable(self._destination.uri, checkpoint, existing, overwrite=overwrite)
            except CheckpointExistsError:
                if not journal.found:  # nothing has arrived
                    journal.end()
                    journal = None
                raise
            ready = functools.partial(self._check_ready, checkpoint, existing, marker)
            relay = self._moved(originals, checkpoint, journal, ready)
            self._commit(checkpoint, relay.copied, existing, marker)
        except BaseException as error:
            is_left = journal is None or self._is_left(journal, error)
            if isinstance(error, UncertainCommitError):
                marker.leave()  # a commit that may still come needs its objects
            else:
                marker.end()
            if not is_left and type(error) in (StorageError, ObjectNotFoundError):
                raise gave_way(self._destination.uri) from error  # the other copy ended an upload of both
            raise
        self._remove_replaced(existing, checkpoint)
        journal.end()
        marker.end()
        size = sum(info.size for info in originals.values())
        uris = self._source.uri, self._destination.uri
        return Copied(*uris, len(originals), size, relay.sent, relay.by_store)

    def _found(self, checkpoint: Checkpoint) -> Copied:
        sizes = {**checkpoint.least, **checkpoint.exact}
        uris = self._source.uri, self._destination.uri
        return Copied(*uris, len(sizes), sum(sizes.values()), was_there=True)

    def _check_ready(
        self, checkpoint: Checkpoint, existing: Mapping[str, Previous], marker: SaveLease
    ) -> None:
        """Make sure that this copy may make objects visible, or delete what has their names.

        Raises:
            CommitError: another copy took over, or gc took this one for dead.
            CheckpointExistsError: a checkpoint was committed meanwhile, and may have objects of these names.
        """
        store = self._destination
        if not marker.is_there():
            raise gave_way(store.uri)
        if all(map(is_unique, checkpoint.least)):
            return
        for name in {md.METADATA_NAME, *checkpoint.metadata}:
            previous = existing.get(name)
            try:
                version = store.stat(name).version or ""
            except ObjectNotFoundError:
                version = None
            if version != (previous and previous.version):
                raise CheckpointExistsError(
                    "another checkpoint was committed here while this one was copied",
                    uri=store.uri,
                    object_name=name,
                    hint="Two jobs write to the same place: give each its own URI",
                )

    def _moved(
        self,
        originals: Mapping[str, ObjectInfo],
        checkpoint: Checkpoint,
        journal: CopyJournal,
        ready: Callable[[], None],
    ) -> Relay:
        """Have every object at the destination."""
        there = held_of(self._destination, originals, self._other.options.concurrency)
        relay = Relay(
            self._source,
            self._one.options,
            self._destination,
            self._other.options,
            journal=journal,
            ready=ready,
            observer=self._observer,
        )
        left: list[Original] = []
        for name, info in originals.items():
            entry, held = journal.found.get(name), there.get(name)
            if held is not None and is_same(info, held, entry):
                relay.copied[name] = held
                self._reused.add(name)
                if entry is not None and entry.upload_id is not None:
                    give_up(self._destination, Upload(name, entry.upload_id))
                journal.finish(name, Entry(info.size, info.version, done=held.version or ""))
            else:
                left.append(Original(info, checkpoint.checks[name], in_the_way=held is not None))
        if self._begun is not None:
            self._begun(sum(one.info.size for one in left))
        relay.copy(left)
        return relay

    def _commit(
        self,
        checkpoint: Checkpoint,
        objects: Mapping[str, ObjectInfo],
        existing: Mapping[str, Previous],
        marker: SaveLease,
    ) -> None:
        """Make the checkpoint visible, after a last check that no other process took this copy for dead.

        Of ranks that saved without each other, each one's metadata is a commit of its own.
        """
        store = self._destination
        ensure_there(store, objects, self._reused)
        if not marker.is_there():
            raise gave_way(store.uri)
        # What another copy puts under a name that is unique is the same.
        committing = [replace(one, version=None) if is_unique(name) else one for name, one in objects.items()]
        for name, data in sorted(checkpoint.metadata.items()):
            previous = existing.get(name)
            if previous is not None and previous.data == data:
                continue
            commit.put_metadata(store, name, data, data, previous)
            if marker.is_gone():
                commit.ensure_whole(store, name, data, committing, previous)
        # What counted before goes last: of all ranks, it goes before each rank's own.
        store.delete(sorted(existing.keys() - checkpoint.metadata.keys()))

    def _is_left(self, journal: CopyJournal, error: BaseException) -> bool:
        """Keep what has arrived for the next copy; False where that has started already."""
        if not journal.leave():
            for upload in journal.unshared:
                give_up(self._destination, upload)
            return False
        error.add_note(
            "What has arrived at the destination stays there, invisible: "
            "the same copy goes on from it, and gc removes it"
        )
        return True

    def _remove_replaced(self, existing: Mapping[str, Previous], checkpoint: Checkpoint) -> None:
        replaced = {one for previous in existing.values() for one in previous.objects}
        try:
            self._destination.delete(sorted(replaced - checkpoint.least.keys()))
        except StorageError as error:
            _log.warning("the copy is committed; replaced objects could not be deleted, and stay: %s", error)

    def _clear_away(self, digest: str) -> None:
        """Remove the journal of a copy that died right after its commit, and its marker."""
        try:
            found, _ = read_journal(self._destination)
            if found is not None and found.digest == digest:
                self._destination.delete([JOURNAL_NAME, marker_name(found.copy)])
        except StorageError as error:
            _log.warning("the journal of an earlier copy could not be deleted, and stays: %s", error)


def _existing(store: ObjectStore) -> dict[str, Previous]:
    """All that is committed at the destination, by the metadata's name."""
    names = {md.METADATA_NAME, *listed_metadata(store)}  # a listing may lag behind
    found = {name: commit.find_previous(store, name) for name in sorted(names)}
    return {name: previous for name, previous in found.items() if previous is not None}


def _counting(existing: Mapping[str, Previous]) -> Mapping[str, Previous]:
    """Return the metadata that counts: that of all ranks, or else that of each."""
    name = md.METADATA_NAME
    return {name: existing[name]} if name in existing else existing


def _is_there(checkpoint: Checkpoint, existing: Mapping[str, Previous]) -> bool:
    return {name: one.data for name, one in _counting(existing).items()} == checkpoint.metadata


def _check_replaceable(
    uri: str, checkpoint: Checkpoint, existing: Mapping[str, Previous], *, overwrite: bool
) -> None:
    """Refuse to replace a checkpoint without ``overwrite``, or one that can't stay whole meanwhile.

    Raises:
        CheckpointExistsError: such a one is there.
    """
    others = [n for n, one in _counting(existing).items() if one.data != checkpoint.metadata.get(n)]
    if others and not overwrite:
        raise CheckpointExistsError(
            "another checkpoint is committed here already",
            uri=uri,
            hint="Copy to another URI, or overwrite it (--overwrite)",
        )
    for name in others:
        named = _named(existing[name].data, uri, name) & checkpoint.least.keys()
        if taken := sorted(one for one in named if not is_unique(one)):
            raise CheckpointExistsError(
                "the checkpoint here has data objects of the same names, and would not stay whole",
                uri=uri,
                object_name=taken[0],
                hint="Delete it first (`cloudckpt rm`), or copy to another URI",
            )


def _named(data: bytes, uri: str, name: str) -> frozenset[str]:
    try:
        return md.objects_of(md.load(data, uri=uri, name=name))
    except CheckpointError:
        return frozenset()  # it can't be loaded
