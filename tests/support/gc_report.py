"""A writer of stock DCP that reports on the process in which it runs."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata


class Reporting(FileSystemWriter):
    """Writes beside the checkpoint whether its process collects garbage by itself."""

    def finish(self, metadata: Metadata, results: Any) -> None:
        (Path(self.path) / "collects").write_text(str(gc.isenabled()))
        super().finish(metadata, results)
