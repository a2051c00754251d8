"""An S3 server on loopback: moto's, in a process of its own that ends when its parent does."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import boto3


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """Serve an empty ``bucket`` from memory; yield the server's URL.

    Meanwhile this process and its children have credentials that open nothing else, and none of the
    caller's AWS settings.
    """
    with _environment(), _process() as endpoint:
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=bucket)
        yield endpoint


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
            raise SystemExit('moto\'s S3 server did not start. Is it there? pip install "moto[s3,server]"')
        yield endpoint
    finally:
        server.kill()
        server.communicate()


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    for name in [name for name in before if name.startswith(("AWS_", "CLOUDCKPT_"))]:
        del os.environ[name]
    os.environ.update(
        AWS_ACCESS_KEY_ID="demo",
        AWS_SECRET_ACCESS_KEY="demo",  # noqa: S106 - opens nothing
        AWS_DEFAULT_REGION="us-east-1",
        AWS_CONFIG_FILE=os.devnull,
        AWS_SHARED_CREDENTIALS_FILE=os.devnull,
        AWS_EC2_METADATA_DISABLED="true",
        NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1",
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve() -> None:
    # Else it prints every request, and a traceback where two requests to abort one upload meet.
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 - only this process needs it

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    sys.stdout.write(f"http://{host}:{port}\n")
    sys.stdout.flush()
    sys.stdin.read()  # ends when the parent does, however it ends
    server.stop()


if __name__ == "__main__":
    _serve()
