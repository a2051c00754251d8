"""The StorageWriter: DCP's save, with nothing visible before the commit."""

from __future__ import annotations

import functools
import os
import pickle
import uuid
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from torch.distributed.checkpoint import storage as dcp_storage
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from cloudckpt.backends.config import uri_hints
from cloudckpt.backends.config.options import true_or_false
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.dcp_base import CheckpointStorageMixin
from cloudckpt.backends.errors import (
    CheckpointError,
    CheckpointExistsError,
    ConfigurationError,
    StorageError,
    UncertainCommitError,
)
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.save import commit, object_layout, object_plan, write_results
from cloudckpt.backends.save.commit_requests import Coordinator
from cloudckpt.backends.save.uploader import Observer, StagedObject, Uploader
from cloudckpt.backends.stores.base import ObjectInfo, ObjectStore
from cloudckpt.backends.stores.size_limit import loadable
from cloudckpt.backends.system import background_log, tracebacks
from cloudckpt.backends.system.printable import one_line
from cloudckpt.backends.torch_private import StorageInfo
from cloudckpt.backends.transfer.request_limit import transfers
from cloudckpt.backends.version import __version__

_log = background_log.logger(__name__)


class StorageWriter(CheckpointStorageMixin, dcp_storage.StorageWriter):
    """Saves a DCP checkpoint to object storage, whole or not at all.

    ``write_data`` stores every part of a rank's objects and leaves the uploads open. ``finish`` on the
    coordinator completes them all, checks their sizes, and puts ``.metadata``; a failure on any rank
    withdraws what all ranks staged. The format is DCP's own.

    Works in ``dcp.save`` and in ``dcp.async_save``, by thread or by process: it pickles with every option,
    and keeps them over ``reset``.

    Args:
        uri: where the checkpoint goes, such as ``s3://bucket/run/step-100``; options may stand in its query.
            A target that was parsed before has its options already.
        overwrite: replace a checkpoint that is committed there. It stays whole until the new one is.
        notes: numbers that are kept in ``.metadata`` by name; stock DCP ignores them.
        options: as in the table of options; they win over the query and ``CLOUDCKPT_*`` in the environment.

    Raises:
        ConfigurationError: the URI or an option can't be used.
    """

    _taker = "StorageWriter"

    def __init__(
        self,
        uri: str | os.PathLike[str] | Target,
        *,
        overwrite: bool = False,
        notes: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(uri, options)
        self._overwrite = true_or_false("overwrite", overwrite)
        try:
            self._notes = {str(name): float(value) for name, value in (notes or {}).items()}
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"a note is a number: {error}", uri=self._target.uri) from error
        self._begin()

    def _begin(self) -> None:
        self._save_id = uuid.uuid4().hex
        self._rank = 0
        self._use_collectives = True
        self._coordinator = True
        self._previous: commit.Previous | None = None
        self._uploader: Uploader | None = None
        self._requests: Coordinator | None = None
        self._observer: Observer | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the configuration; a save under way and its connections stay behind."""
        return {"target": self._target, "overwrite": self._overwrite, "notes": self._notes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._target, self._store = state["target"], None
        self._overwrite, self._notes = state["overwrite"], state["notes"]
        self._begin()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._target.uri!r}, overwrite={self._overwrite})"

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Make ready for another save, to ``checkpoint_id`` where one is given, with the same options."""
        self._sweep()
        self._move(checkpoint_id)

    def set_up_storage_writer(
        self,
        is_coordinator: bool,
        *args: Any,  # noqa: ARG002 - DCP's interface
        **kwargs: Any,
    ) -> None:
        """Begin a save on this rank.

        With a remote store the coordinator's requests are only started here: their errors reach `finish`.

        Raises:
            CheckpointExistsError: on the coordinator, where one is committed and ``overwrite`` is off.
            ConfigurationError: the store does not support an option.
        """
        self._rank = kwargs.get("rank") or 0
        self._use_collectives = kwargs.get("use_collectives", True)
        self._coordinator = is_coordinator or not self._use_collectives
        self._sweep()
        self._save_id = uuid.uuid4().hex
        self._previous = None
        try:
            store = self._opened()
            object_layout.check_part_size(self._target.options, store.part_limits, store.uri)
            if self._coordinator:
                uri_hints.warn_of_new_folder(self._target.typed)
                self._requests = Coordinator(store)
                for look in self._looks(store):
                    self._requests.look(look)
        except CheckpointError as error:
            error.located(uri=self._target.uri, rank=self._rank)
            raise

    def _looks(self, store: ObjectStore) -> list[Callable[[], None]]:
        """Return the looks that may refuse the save on its coordinator."""
        return [functools.partial(self._find_previous, store)]

    def _find_previous(self, store: ObjectStore) -> None:
        """Find the checkpoint that this save replaces.

        Raises:
            CheckpointExistsError: there is one, and ``overwrite`` is off.
        """
        previous = commit.find_previous(store, self._metadata_name)
        if previous is not None and not self._overwrite:
            raise self._exists()
        _ = store.capabilities  # found out now, not when all bytes are sent
        self._previous = previous

    def _refuse_existing(self, store: ObjectStore) -> None:
        """Refuse the save on a rank that is not its coordinator, which learns as much at the same time.

        Raises:
            CheckpointExistsError: a checkpoint is committed here.
        """
        try:
            found = store.holds(self._metadata_name)
        except StorageError as error:
            _log.debug("rank %d leaves the look at .metadata to the coordinator: %s", self._rank, error)
            return
        if found:
            raise self._exists()

    def _exists(self) -> CheckpointExistsError:
        return CheckpointExistsError(
            "a checkpoint is committed here already",
            uri=self._target.uri,
            rank=self._rank,
            hint="Save to another URI, or pass overwrite=True to replace it",
        )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add: a rank names its objects itself."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Mark the save as in progress.

        The marker is there before a byte is sent. With a remote store its put is only started here.
        To the plans there is nothing to add: names carry an id of their own, so that even a cached plan
        never reuses one.

        Raises:
            StorageError: the store could not be written to.
        """
        try:
            if self._requests is None:
                self._requests = Coordinator(self._opened())
            self._requests.mark(self._save_id, self._rank)
        except CheckpointError as error:
            error.located(uri=self._target.uri, rank=self._rank)
            raise
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Store this rank's items and leave the uploads open.

        A failure here does not raise: DCP would skip ``finish`` then, and the other ranks' uploads would
        stay open for good. It travels in the results instead, and ``finish`` withdraws everything and
        raises it.
        """
        results: list[WriteResult] = []
        try:
            report = commit.RankReport(self._rank, tuple(self._stage(plan, planner, results)))
        except BaseException as error:  # noqa: BLE001 - Ctrl-C too: the other ranks must learn of it
            results.clear()
            self._try_to_abandon()
            report = commit.RankReport(self._rank, failure=self._explained(error))
        if not self._coordinator and self._store is not None:
            self._store.close()
        results.append(WriteResult(_REPORT, 0, report))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit on the coordinator: complete every upload, check, put ``.metadata``.

        Raises:
            Exception: what failed on a rank during ``write_data``.
            CommitError: an upload could not be completed, or the commit failed.
            UncertainCommitError: no answer tells whether the commit happened.
            CheckpointExistsError: another save committed here in the meantime.
        """
        reports = write_results.reports_in(results)
        staged = [one for report in reports for one in report.staged]
        self._uploader = None
        at_once = commit.at_once(self._target.options, len(reports))
        with self._opened() as store:
            requests = self._requests = self._requests or Coordinator(store)
            try:
                write_results.raise_failures(reports)
                stored = write_results.stored(metadata, results, store.uri)
                requests.settle()
                requests.begin_check()
                objects = commit.publish(store, staged, at_once)
                data = self._described(metadata, stored, objects)
                requests.check()
            except BaseException as error:
                self._withdraw(store, staged, error)
                raise
            try:
                commit.put_metadata(store, self._metadata_name, data, self._save_id, self._previous)
                requests.conclude(
                    functools.partial(self._ensure_whole, store, objects, at_once),
                    functools.partial(self._remove_previous, store, objects.keys())
                    if self._previous is not None
                    else None,
                )
            except UncertainCommitError as error:
                error.located(rank=self._rank)
                self._leave_marker()
                raise
            except CheckpointError as error:
                self._withdraw(store, staged, error)
                raise
            except BaseException:
                self._leave_marker()
                raise
            # Anything else, such as Ctrl-C, may have come after the commit: nothing is deleted then.

    def abort(self) -> None:
        """Give up a save that was started and whose ``finish`` will not come, on this rank.

        DCP tells a writer nothing when a planner's ``finish_plan`` fails on another rank; a caller that
        learns of it calls this. Without it, the next save with the same writer does the same, and otherwise
        ``gc``.

        Raises:
            StorageError: the store could not list or abort what is pending.
        """
        self._end_marker()
        self._abandon()

    def observe(self, observer: Observer | None) -> None:
        """Call ``observer`` with an object's name and a number of bytes whenever so many have been stored.

        It is called from the threads that send, and must not raise. It does not travel in a pickle.
        """
        self._observer = observer

    def storage_meta(self) -> StorageMeta:
        """Return DCP's record of the place and the save."""
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self._save_id)

    @property
    def _metadata_name(self) -> str:
        return md.metadata_name(None if self._use_collectives else self._rank)

    def _sweep(self) -> None:
        """Give up an earlier save, if its end is unknown."""
        self._end_marker()
        self._try_to_abandon()

    def _abandon(self) -> None:
        uploader, self._uploader = self._uploader, None
        if uploader is not None:
            concurrency = self._target.options.concurrency
            commit.abandon(
                self._opened(), uploader.started, f"__{self._rank}_", uploader.unconfirmed, concurrency
            )

    def _try_to_abandon(self) -> None:
        try:
            self._abandon()
        except StorageError as error:
            _log.warning(
                "%s: uploads of a failed save could not be aborted, and stay pending: %s",
                self._target.uri,
                error,
            )

    def _stage(self, plan: SavePlan, planner: SavePlanner, results: list[WriteResult]) -> list[StagedObject]:
        options, store = self._target.options, self._opened()
        self._uploader = Uploader(store, transfers(store, options), options.memory_limit, self._observer)
        objects = object_plan.laid_out(plan.items, planner, self._rank, options, store)
        sent = self._uploader.send({one.name: one.to_send() for one in objects}, self._cleared(store))
        for one, its in zip(objects, sent, strict=True):
            results += one.results(self._uploader.algorithm, its.fragments)
        return [its.staged for its in sent]

    def _cleared(self, store: ObjectStore) -> Callable[[], None] | None:
        """Return what has to succeed before this rank sends a byte, while its uploads are started."""
        if self._requests is not None:
            return self._requests.settle
        looks = store.is_remote and not self._overwrite
        return functools.partial(self._refuse_existing, store) if looks else None

    def _explained(self, error: BaseException) -> BaseException:
        """Return the error as the other ranks should see it."""
        if isinstance(error, CheckpointError):
            error.located(uri=self._target.uri, rank=self._rank)
        else:
            error.add_note(f"raised on rank {self._rank}, while saving {one_line(self._target.uri)}")
        if frames := tracebacks.shown(error):
            error.add_note(frames)
        _log.debug("rank %d could not write its part", self._rank, exc_info=error)
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301 - made on the line itself
        except Exception:  # noqa: BLE001 - an exception of the caller's own: it would break the gather
            return CheckpointError(f"{type(error).__name__}: {error}", uri=self._target.uri, rank=self._rank)
        return error

    def _described(
        self,
        metadata: Metadata,
        items: dict[MetadataIndex, StorageInfo],
        objects: dict[str, ObjectInfo],
    ) -> bytes:
        """Complete the planner's metadata with what is stored where, and serialise it."""
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = items
        metadata.storage_meta = self.storage_meta()
        md.add_extras(metadata, self._save_id, __version__, objects, self._notes)
        return loadable(self._target, self._metadata_name, md.dump(metadata))

    def _ensure_whole(self, store: ObjectStore, objects: dict[str, ObjectInfo], at_once: int) -> None:
        name, its = self._metadata_name, list(objects.values())
        commit.ensure_whole(store, name, self._save_id, its, self._previous, concurrency=at_once)

    def _end_marker(self) -> None:
        if self._requests is not None:
            self._requests.end()
            self._requests = None

    def _leave_marker(self) -> None:
        """Leave the marker to expire: a commit that may still come needs its objects."""
        if self._requests is not None:
            self._requests.leave()
            self._requests = None

    def _withdraw(self, store: ObjectStore, staged: list[StagedObject], error: BaseException) -> None:
        commit.withdraw(store, staged, self._target.options.concurrency)
        self._end_marker()
        if isinstance(error, CheckpointError):
            error.located(rank=self._rank)

    def _remove_previous(self, store: ObjectStore, current: AbstractSet[str]) -> None:
        if self._previous is None:
            return
        try:
            store.delete(sorted(self._previous.objects - current))
        except StorageError as error:
            _log.warning(
                "the save is committed; objects that it replaced could not be deleted, and stay: %s", error
            )


_REPORT = MetadataIndex("cloudckpt.report")
"""The index of the write result that carries a rank's report; ``finish`` takes it out again."""
