"""Read leases: a hidden object beside a checkpoint, renewed while a process loads it.

Retention deletes no checkpoint that has a live lease. The reader puts its lease while it reads
``.metadata``, and reads no data before it has both. The deleter looks for leases before it deletes
``.metadata`` and again afterwards, and leaves the data objects where it finds one. So a reader finds every
object, unless ``.metadata`` was deleted after it was read and before the lease was put. A load of such a step
ends as if it had started after the deletion: the step is not there.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from datetime import datetime
from typing import Final

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointError
from cloudckpt.backends.manage.confirmation import leases_now
from cloudckpt.backends.save.save_lease import SaveLease, is_silent
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import ObjectInfo, ObjectStore
from cloudckpt.backends.system import background_log

_log = background_log.logger(__name__)

_PREFIX: Final = ".cloudckpt-load."
READ_LEASE: Final = re.compile(rf"(?:.*/)?{re.escape(_PREFIX)}[0-9a-f]{{32}}")
"""Names of read leases; each covers the checkpoint in its folder."""


def is_read(objects: Iterable[ObjectInfo], alive: datetime, store: ObjectStore | None = None) -> bool:
    """Return True if a lease among these objects was renewed after ``alive``.

    Args:
        objects: what a listing shows.
        alive: the time after which a lease must have been renewed.
        store: where leases that seem to have expired are read, for who deletes on the answer.

    Raises:
        StorageError: the store could not be read.
    """
    leases = [info for info in objects if READ_LEASE.fullmatch(info.name)]
    if store is not None:
        leases = leases_now(store, leases, alive)
    return any(not is_silent(info, alive) for info in leases)


def put_lease(target: Target, rank: int) -> SaveLease | None:
    """Put a read lease on a checkpoint, and return it; None for a process that may not write there.

    Args:
        target: the checkpoint.
        rank: of this process, for people who look at the lease.
    """
    own_id = uuid.uuid4().hex
    store = open_store(target)
    try:
        return SaveLease(store, own_id, rank, name=f"{_PREFIX}{own_id}")
    except CheckpointError as error:
        _log.debug("reading %s without a lease, which could not be put: %s", store.uri, error)
        return None
