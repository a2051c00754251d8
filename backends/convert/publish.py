"""Objects that appear whole or not at all, and last of all the one that says which there are."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cloudckpt.backends.config.options import Options
from cloudckpt.backends.convert import convert_lease
from cloudckpt.backends.errors import CheckpointError, CheckpointExistsError, PreconditionFailedError
from cloudckpt.backends.save import commit, object_layout
from cloudckpt.backends.save.uploader import Observer, Uploader
from cloudckpt.backends.stores.base import ObjectStore, Overwrite
from cloudckpt.backends.system import background_log
from cloudckpt.backends.transfer.segments import Segment

_log = background_log.logger(__name__)


@dataclass(frozen=True, slots=True)
class Planned:
    """An object to put."""

    size: int
    """Bytes."""
    segments: Iterator[Segment]


@dataclass(frozen=True, slots=True)
class Putting:
    """The way to put objects.

    Args:
        store: where to.
        options: of the store.
        memory_limit: bytes held at most.
        overwrite: whether what is there may go.
        observer: called for every part that is stored.
        check: called when all bytes are stored and nothing is visible yet; raises where they are not good.
    """

    store: ObjectStore
    options: Options
    memory_limit: int
    overwrite: bool
    observer: Observer | None
    check: Callable[[], None]

    def ensure_free(self, names: Sequence[str]) -> None:
        """Make sure that none of these objects is there, or may be overwritten.

        Raises:
            CheckpointExistsError: one is there.
            ConfigurationError: the store does not take parts of the size that is configured.
        """
        object_layout.check_part_size(self.options, self.store.part_limits, self.store.uri)
        if names and not self.overwrite:
            raise CheckpointExistsError(
                "this is there already",
                uri=self.store.uri,
                object_name=names[0],
                hint="Convert to another URI, or pass overwrite=True (--overwrite) to replace it",
            )

    def put(
        self,
        objects: Mapping[str, Planned],
        *,
        index: tuple[str, bytes] | None = None,
        replaced: Sequence[str] = (),
        failed: threading.Event | None = None,
    ) -> None:
        """Store every object, then remove what is ``replaced``, and make them visible, the index last.

        An upload can't be completed over what is there, on stores that look. So between the removal and the
        end nothing is there, and never half of it.

        Raises:
            Exception: nothing of it is visible.
        """
        uploader = Uploader(
            self.store,
            self.options.concurrency,
            self.memory_limit,
            self.observer,
            padded=False,  # what follows the end of a file would be read as a part of it
            failed=failed,
        )
        visible: list[str] = []
        plan = convert_lease.Plan(tuple(objects), None if index is None else index[0], tuple(replaced))
        lease = convert_lease.take(self.store, plan)
        try:
            sent = uploader.send(
                {name: (one.segments, self._part_size(one)) for name, one in objects.items()}
            )
            self.check()
            lease.check()
            for names in (replaced[:1], replaced[1:]):  # an index is the first, and goes before its files
                if names:
                    self.store.delete(names)
            for one in sent:
                self.store.complete_upload(one.staged.upload, one.staged.parts)
                visible.append(one.staged.upload.name)
            if index is not None:
                visible.insert(0, index[0])
                self.store.put(*index, Overwrite())
            lease.check()  # gc may have deleted the first files while the last ones were completed
        except BaseException as error:
            self._withdraw(uploader, visible)
            lease.end()
            if isinstance(error, PreconditionFailedError):
                raise CheckpointExistsError(
                    "another has put this here meanwhile",
                    uri=self.store.uri,
                    object_name=error.object_name,
                    hint="It was left as it is; convert to another URI",
                ) from error
            raise
        lease.end()

    def _part_size(self, one: Planned) -> int:
        usual = min(object_layout.usual_part_size(self.options), self.memory_limit)
        return object_layout.fitting_part_size(one.size, usual, self.store.part_limits)

    def _withdraw(self, uploader: Uploader, visible: Sequence[str]) -> None:
        """Take back what was put, the index first; what can't be is logged, for the failure matters more."""
        pending = [upload for upload in uploader.started if upload.name not in visible]
        lost, concurrency = uploader.unconfirmed, self.options.concurrency
        steps = [
            *(functools.partial(self.store.delete, [name]) for name in visible),
            functools.partial(commit.abandon, self.store, pending, "", lost, concurrency),
        ]
        for step in steps:
            try:
                step()
            except CheckpointError as error:
                _log.warning("a failed conversion could not be cleaned up: %s", error)
