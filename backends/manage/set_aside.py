"""Checkpoints that were set aside: withdrawn from every reader, with all their bytes kept.

A checkpoint exists while its ``.metadata`` does. Setting it aside stores these bytes under a hidden name in
the same folder and deletes ``.metadata``. Its data objects stay, and the folder is free for another
checkpoint. To undo it, rename the hidden object to ``.metadata``.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from typing import Final

from cloudckpt.backends.errors import ObjectNotFoundError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.save import commit
from cloudckpt.backends.stores.base import Create, ObjectInfo, ObjectStore, Overwrite

_PREFIX: Final = ".cloudckpt-aside."
ASIDE: Final = re.compile(rf"(?:.*/)?{re.escape(_PREFIX)}[0-9a-f]{{32}}")
"""Names of metadata objects that were set aside."""
NOTICE: Final = ".cloudckpt-aside"
"""The hidden object that says when a checkpoint was last set aside in its folder.

Its name is known, so that a plain read finds it where a listing does not show the metadata yet.
"""


def set_aside(store: ObjectStore) -> bool:
    """Withdraw the checkpoint at the root of a store from readers, and keep its objects.

    Args:
        store: opened at the checkpoint.

    Returns:
        False if no checkpoint is committed there.

    Raises:
        StorageError: the store could not be read or written. The checkpoint is committed then, or set aside.
    """
    try:
        data, _ = store.get(md.METADATA_NAME)
    except ObjectNotFoundError:
        return False
    store.put(f"{_PREFIX}{uuid.uuid4().hex}", data, Create())
    store.put(NOTICE, b"a checkpoint was set aside here\n", Overwrite())  # before nothing names its objects
    store.delete([md.METADATA_NAME])
    return True


def objects_of(store: ObjectStore, asides: Iterable[ObjectInfo]) -> frozenset[str]:
    """Return the data objects that metadata which was set aside names, and no committed metadata does.

    Args:
        store: any that holds the folders of the metadata.
        asides: metadata objects that were set aside.

    Raises:
        StorageError: the store could not be read.
    """
    found: set[str] = set()
    for one in asides:
        folder = one.name[: one.name.rfind("/") + 1]
        previous = commit.find_previous(store, one.name)
        current = commit.find_previous(store, folder + md.METADATA_NAME)
        if previous is not None:
            named = current.objects if current is not None else frozenset[str]()
            found |= {folder + name for name in previous.objects - named}
    return frozenset(found)
