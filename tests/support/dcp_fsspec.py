"""DCP's own storage on fsspec, under either of its names: torch 2.15 made the module public."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
else:
    _PUBLIC = "torch.distributed.checkpoint.fsspec_filesystem"
    _named = (
        _PUBLIC if importlib.util.find_spec(_PUBLIC) else "torch.distributed.checkpoint._fsspec_filesystem"
    )
    FsspecReader = importlib.import_module(_named).FsspecReader
    FsspecWriter = importlib.import_module(_named).FsspecWriter

__all__ = ["FsspecReader", "FsspecWriter"]
