"""The two-phase commit: what the coordinator does once every rank has staged its objects.

Phase two completes all uploads side by side, checks what the store then holds, and puts ``.metadata`` on a
condition. That put is the commit. Before it there is no checkpoint and everything staged can be withdrawn;
after it there is a whole one. A put without an answer is settled by reading back: the id of the save is in
the metadata.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cloudckpt.backends.config.options import Options
from cloudckpt.backends.errors import (
    CheckpointError,
    CheckpointExistsError,
    CommitError,
    ConfigurationError,
    IntegrityError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    UnansweredError,
    UncertainCommitError,
    UnsafeCheckpointError,
)
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.save.object_checks import ASKED_ONE_BY_ONE, found, listed_sizes, missing
from cloudckpt.backends.save.uploader import StagedObject
from cloudckpt.backends.stores.base import (
    Condition,
    Create,
    ObjectInfo,
    ObjectStore,
    Overwrite,
    Update,
    Upload,
)
from cloudckpt.backends.stores.throttle import ON_BEHALF
from cloudckpt.backends.system import background_log
from cloudckpt.backends.system.printable import one_line
from cloudckpt.backends.transfer.adaptive_concurrency import AdaptiveLimiter, lanes
from cloudckpt.backends.transfer.task_pool import outcomes_of, run_all

_log = background_log.logger(__name__)
_COMPLETED_AT_FIRST = 8
"""Uploads side by side, until it turns out that they wait."""
_DATA = re.compile(r"[\w.-]+" + re.escape(md.DATA_SUFFIX))
"""Data objects as DCP writers name them, stock ones and ours."""


@dataclass(frozen=True, slots=True)
class Previous:
    """The committed checkpoint that a save is about to replace."""

    version: str
    objects: frozenset[str]
    data: bytes = field(repr=False, default=b"")
    """The metadata as it is stored."""


@dataclass(frozen=True, slots=True)
class RankReport:
    """The result of phase one on a rank. It travels to the coordinator with the rank's write results."""

    rank: int
    staged: tuple[StagedObject, ...] = ()
    failure: BaseException | None = None


def find_previous(store: ObjectStore, name: str) -> Previous | None:
    """Return the checkpoint that is committed under a metadata name; None where nothing is.

    Names of objects that will not be deleted with it are logged: those in other folders, and those that are
    not of data objects. Metadata may name any object, or itself, and is not obeyed.
    """
    try:
        data, info = store.get(name)
    except ObjectNotFoundError:
        return None
    try:
        named = md.objects_of(md.load(data, uri=store.uri, name=name))
        objects = frozenset(one for one in named if _DATA.fullmatch(one))
        elsewhere = sorted(one for one in named - objects if _DATA.fullmatch(one.rpartition("/")[2]))
        _log_kept(store.uri, name, "that lie in other folders", elsewhere)
        _log_kept(store.uri, name, "that are not data objects", sorted(named - objects - {*elsewhere}))
    except (IntegrityError, UnsafeCheckpointError) as error:
        _log.warning("what is overwritten cannot be read, so its objects stay behind: %s", error)
        objects = frozenset()
    return Previous(info.version or "", objects, data)


def _log_kept(uri: str, name: str, which: str, names: Sequence[str]) -> None:
    if names:
        message = "%s of %s names %d objects %s: they stay behind, such as %s"
        _log.warning(message, name, one_line(uri), len(names), which, one_line(names[0]))


def at_once(options: Options, ranks: int) -> int:
    """Return the number of requests without a body that the coordinator may have in flight."""
    return max(options.concurrency, min(ON_BEHALF, options.concurrency * ranks))


def publish(store: ObjectStore, staged: Sequence[StagedObject], concurrency: int) -> dict[str, ObjectInfo]:
    """Complete every upload and check every object's size; returns what is visible now, by name.

    Raises:
        CommitError: an upload could not be completed, or an object is not as long as what was sent.
    """
    one_by_one = len(staged) <= ASKED_ONE_BY_ONE
    held = lanes(store.uri, "commit", concurrency, _COMPLETED_AT_FIRST)
    tasks = [functools.partial(_complete, store, held, one, confirm=one_by_one) for one in staged]
    visible = {info.name: info for info in run_all(tasks, concurrency, lambda: held.limit)}
    if not one_by_one:
        listed = listed_sizes(store)
        for one in staged:
            _check_size(store, one, listed.get(one.upload.name))
    return visible


def _complete(store: ObjectStore, held: AdaptiveLimiter, one: StagedObject, *, confirm: bool) -> ObjectInfo:
    try:
        with held.taken(1):
            info = store.complete_upload(one.upload, one.parts, confirm=confirm)
    except CheckpointError as error:
        raise _not_whole(store, one, f"an upload could not be completed: {error.message}") from error
    check_stored(store, one, info)
    return replace(info, checksum=one.checksum)


def check_stored(store: ObjectStore, one: StagedObject, info: ObjectInfo) -> None:
    """Compare what a store says of a completed object with what was sent.

    Raises:
        CommitError: it is not the same.
    """
    _check_size(store, one, info.size)
    _check_sum(store, one, info.checksum)


def _check_sum(store: ObjectStore, one: StagedObject, reported: str | None) -> None:
    """Compare what a store says of its own accord, in the algorithm that was used here."""
    algorithm, _, sent = (one.checksum or "").partition(":")
    if sent and reported is not None and reported != one.checksum and reported.startswith(f"{algorithm}:"):
        raise _not_whole(store, one, f"the store's {algorithm} of an object is not that of what was sent")


def _check_size(store: ObjectStore, one: StagedObject, size: int | None) -> None:
    """``size`` is None for an object that is not listed, which may only mean that the listing lags behind."""
    if size is None:
        try:
            size = store.stat(one.upload.name).size
        except ObjectNotFoundError as error:
            raise _not_whole(store, one, "an object is gone that was completed") from error
    if size != one.size:
        raise _not_whole(store, one, f"the store holds {size} bytes of an object of {one.size}")


def _not_whole(store: ObjectStore, one: StagedObject, message: str) -> CommitError:
    return CommitError(
        message,
        uri=store.uri,
        object_name=one.upload.name,
        hint="Nothing was committed and the checkpoint before is untouched; try again",
    )


def withdraw(store: ObjectStore, staged: Sequence[StagedObject], concurrency: int) -> None:
    """Take back what a failed save left: open uploads and completed objects.

    What can't be removed is logged, for the failure that led here matters more.
    """
    aborts = [functools.partial(store.abort_upload, one.upload) for one in staged]
    outcomes = outcomes_of(aborts, concurrency)
    if staged:
        outcomes += outcomes_of([functools.partial(store.delete, [s.upload.name for s in staged])], 1)
    for error in outcomes:
        if isinstance(error, BaseException):
            _log.warning(
                "%s: objects or uploads of a failed save could not be removed, and stay: %s", store.uri, error
            )


def abandon(
    store: ObjectStore, started: Iterable[Upload], prefix: str, unknown: Iterable[str], concurrency: int
) -> None:
    """Abort the uploads that were started, and those of ``unknown`` names, whose ids never arrived.

    Only the latter are looked for by listing what is pending below ``prefix``.

    Raises:
        StorageError: the store could not abort or list.
    """
    run_all([functools.partial(store.abort_upload, upload) for upload in started], concurrency)
    lost = frozenset(unknown)
    if lost:
        found = [p.upload for p in store.pending_uploads(prefix) if p.upload.name in lost]
        run_all([functools.partial(store.abort_upload, upload) for upload in found], concurrency)


class _Outcome(enum.Enum):
    OURS = "our metadata is there"
    NOT_OURS = "another's metadata is there, and ours can't come any more"
    UNCHANGED = "what we meant to replace is there, and ours can't come any more"
    NOTHING = "no metadata is there, and ours can't come any more"
    UNKNOWN = "the state is unknown"


def put_metadata(
    store: ObjectStore, name: str, data: bytes, author: str | bytes, previous: Previous | None
) -> None:
    """Commit: make ``data`` visible if and only if the object is still ``previous``.

    ``author`` is what it is known by when it is read back: the id of the save, or all of its bytes.

    Raises:
        CheckpointExistsError: another save committed in the meantime.
        UncertainCommitError: no answer tells whether it happened.
        CommitError: it did not happen.
    """
    condition: Condition = Create() if previous is None else Update(previous.version)
    can = store.capabilities
    if not (can.conditional_create if previous is None else can.conditional_update):
        _say_unconditional("/".join(store.uri.split("/")[:3]))  # a bucket, not one of its checkpoints
        there = found(store, name)
        if (there and (there.version or "")) != (previous and previous.version):
            raise (_gone if there is None else _lost)(store.uri, name)
        condition = Overwrite()
    try:
        store.put(name, data, condition)
    except ConfigurationError:  # refused before it was sent
        raise
    except Exception as error:
        conditional = not isinstance(condition, Overwrite)
        outcome = _read_back(store, name, author, previous, error=error, conditional=conditional)
        if outcome is _Outcome.OURS and isinstance(error, UnansweredError | PreconditionFailedError):
            return
        if outcome in (_Outcome.OURS, _Outcome.UNKNOWN):  # the store said that something went wrong
            raise UncertainCommitError(
                f"the commit was sent, and nothing proves that it holds: {_said(error)}",
                uri=store.uri,
                object_name=name,
                hint="Its objects stay in case it is committed: look for it, and save again if need be",
            ) from error
        if outcome is _Outcome.NOT_OURS:
            raise _lost(store.uri, name) from error
        if outcome is _Outcome.NOTHING and isinstance(error, PreconditionFailedError):
            raise _gone(store.uri, name) from error
        raise CommitError(
            f"the commit failed: {_said(error)}",
            uri=store.uri,
            object_name=name,
            hint="Nothing was committed and the checkpoint before is untouched; try again",
        ) from error


def ensure_whole(
    store: ObjectStore,
    name: str,
    author: str | bytes,
    objects: Sequence[ObjectInfo],
    previous: Previous | None,
    *,
    concurrency: int = 1,
) -> None:
    """Take the commit back if gc took the save for dead while it committed, and removed what it names.

    What another put in its place in the meantime counts as removed. A commit that was replaced or deleted
    since is left as it is.

    Raises:
        CommitError: it did; there is what was there before, or nothing.
        UncertainCommitError: it did, and the commit could not be taken back.
    """
    gone = missing(store, objects, concurrency)
    if gone is None:
        return
    place: dict[str, Any] = {"uri": store.uri, "object_name": name}
    try:
        data, info = store.get(name)
        if not _is_by(author, data, store.uri, name):
            return
        if previous is None:
            store.delete([name])
        else:
            can = store.capabilities.conditional_update
            store.put(name, previous.data, Update(info.version or "") if can else Overwrite())
    except (ObjectNotFoundError, PreconditionFailedError):
        return  # another save or a deletion came in between
    except CheckpointError as error:
        raise UncertainCommitError(
            f"gc removed {gone} while it was committed, and taking that back failed: {error.message}",
            hint="What is committed there does not load: delete it, and save again",
            **place,
        ) from error
    raise CommitError(
        f"this save was taken for dead: gc removed {gone} while it was committed",
        hint="It was taken back, and what was there before is there; give gc a longer silent_for, save again",
        **place,
    )


def _read_back(
    store: ObjectStore,
    name: str,
    author: str | bytes,
    previous: Previous | None,
    *,
    error: Exception,
    conditional: bool,
) -> _Outcome:
    """Settle whether a put that raised was carried out after all, or still may be."""
    ours = False
    version: str | None = None
    try:
        data, info = store.get(name)
        version = info.version or ""
        ours = _is_by(author, data, store.uri, name)
    except (ObjectNotFoundError, IntegrityError, UnsafeCheckpointError):
        pass  # nothing is there, or nothing of ours
    except StorageError:
        return _Outcome.UNKNOWN
    if ours:
        return _Outcome.OURS
    unchanged = previous is not None and version == previous.version
    # A request that got no answer may be on its way. A version that is gone never returns, so that one on
    # its condition can't be obeyed any more; nothing returns, when what another save created is deleted.
    if isinstance(error, UnansweredError) and (unchanged or previous is None or not conditional):
        return _Outcome.UNKNOWN
    if version is None:
        return _Outcome.NOTHING
    return _Outcome.UNCHANGED if unchanged else _Outcome.NOT_OURS


def _is_by(author: str | bytes, data: bytes, uri: str, name: str) -> bool:
    if isinstance(author, bytes):
        return data == author
    return md.save_id_of(md.load(data, uri=uri, name=name)) == author


def _said(error: Exception) -> str:
    return error.message if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _lost(uri: str, name: str) -> CheckpointExistsError:
    return CheckpointExistsError(
        "another save committed this checkpoint while this one was under way",
        uri=uri,
        object_name=name,
        hint="Two jobs save to the same place: give each its own URI",
    )


def _gone(uri: str, name: str) -> CommitError:
    return CommitError(
        "the checkpoint that was here was deleted while this save was under way",
        uri=uri,
        object_name=name,
        hint="Nothing was committed; save again",
    )


@functools.cache
def _say_unconditional(place: str) -> None:
    """Say it, once for a place and process."""
    _log.warning(
        "%s does not support conditional puts: two jobs that commit the same checkpoint at the same moment "
        "would not notice each other",
        one_line(place),
    )
