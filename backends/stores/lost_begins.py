"""Abort a second upload that an attempt to begin one may have left, where its answer was lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cloudckpt.backends.errors import StorageError
from cloudckpt.backends.stores.base import PendingUpload, Upload
from cloudckpt.backends.system import background_log
from cloudckpt.backends.system.printable import one_line

_log = background_log.logger(__name__)


def abort_others(
    ours: Upload,
    pending: Callable[[str], Iterable[PendingUpload]],
    abort: Callable[[Upload], None],
    *,
    uri: str,
    request: str,
    cure: str,
) -> None:
    """Abort the pending uploads of a name but one. A failure is logged.

    Args:
        ours: the upload that stays.
        pending: lists the pending uploads below a prefix of names.
        abort: aborts an upload.
        uri: of the store.
        request: names the request whose answer was lost.
        cure: says what removes an upload that stays pending.
    """
    try:
        for other in list(pending(ours.name)):
            if other.upload.name == ours.name and other.upload != ours:
                abort(other.upload)
    except StorageError as error:
        _log.warning(
            "%s: the answer to %s was lost, so a second upload of %s may be pending, "
            "which could not be looked for (%s). %s",
            one_line(uri),
            request,
            one_line(ours.name),
            error,
            cure,
        )
