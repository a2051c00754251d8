"""A GCS server on loopback: that of the tests, in a process of its own that ends when its parent does."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

_TESTS = Path(__file__).resolve().parents[2] / "tests"


@contextlib.contextmanager
def gcs_server(bucket: str) -> Iterator[str]:
    """Serve an empty ``bucket`` from memory; yield the server's URL."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith(("GOOGLE_", "CLOUDCKPT_", "STORAGE_EMULATOR"))]:
        del os.environ[name]
    # Stock DCP reads through gcsfs, which else asks the bucket's type of Google.
    local = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    os.environ.update(local)
    try:
        with _process() as endpoint:
            _create(endpoint, bucket)
            yield endpoint
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _process() -> Iterator[str]:
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches the demo alone, which ends the server last
    )
    assert server.stdout is not None  # noqa: S101 - for type checkers: it was given PIPE
    try:
        endpoint = server.stdout.readline().strip()
        if not endpoint:
            raise SystemExit("The GCS server of the tests did not start.")
        yield endpoint
    finally:
        server.kill()
        server.communicate()


def _create(endpoint: str, bucket: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", "/storage/v1/b?project=demo", json.dumps({"name": bucket}))
        connection.getresponse().read()


def _serve() -> None:
    import threading  # noqa: PLC0415 - only this process needs these

    sys.path.insert(0, str(_TESTS))
    from support.gcs_server import main  # noqa: PLC0415

    threading.Thread(target=main, args=(["--port=0"],), daemon=True).start()
    sys.stdin.read()  # ends when the parent does, however it ends


if __name__ == "__main__":
    _serve()
