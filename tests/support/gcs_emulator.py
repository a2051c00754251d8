"""A Google Cloud Storage of somebody else: the emulator that PyPI has as `gcp-storage-emulator`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from support.servers import HOST, served_by


@contextmanager
def gcs_emulator() -> Iterator[str]:
    """Run the emulator over memory; its URL without a trailing slash."""

    def command(port: int) -> list[str]:
        options = ["--host", HOST, "--port", str(port), "--in-memory", "--quiet"]
        return [sys.executable, "-m", "gcp_storage_emulator", "start", *options]

    with served_by("gcs-emulator", command) as server:
        yield server.endpoint
