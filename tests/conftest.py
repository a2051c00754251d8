"""Fixtures that every test may use. Each pytest-xdist worker starts its own servers, when first asked for."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloudckpt.backends.system import background_log
from support import live
from support.fake_gcs import FakeGCS, shared_fake_gcs_server
from support.gcs import GCSServer, shared_gcs_server
from support.places import SOAKED, USUAL, Place, new_place
from support.ranks import rank_pool
from support.servers import MORE_SERVERS, SERVERS, NotInstalledError, S3Server

__all__ = ["rank_pool"]  # a fixture for every test

# Stock DCP goes through gcsfs, which reads this on import, and else asks each bucket's type over gRPC.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


@pytest.fixture(scope="session", autouse=True)
def _no_cloud_settings_of_the_user() -> Iterator[None]:
    """Keep the tests from the user's AWS profile, credentials and instance metadata, but for `make live`."""
    if live.uri() is not None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in [
            name
            for name in os.environ
            if name.startswith(("AWS_", "CLOUDCKPT_", "GOOGLE_", "STORAGE_EMULATOR_HOST"))
        ]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


# Final for type checkers; there is no other way in.
class _SettledLog(pytest.LogCaptureFixture):  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    """What was logged, also by threads that don't wait for their messages to be handled."""

    @property
    def records(self) -> list[logging.LogRecord]:
        background_log.flush(10)
        return super().records

    @property
    def text(self) -> str:
        background_log.flush(10)
        return super().text


@pytest.fixture
def caplog(request: pytest.FixtureRequest) -> Iterator[pytest.LogCaptureFixture]:
    """Messages of the test, as pytest's own fixture has them."""
    log = _SettledLog(request.node, _ispytest=True)
    yield log
    log._finalize()


@pytest.fixture(scope="session")
def s3_server_named() -> Iterator[Callable[[str], S3Server]]:
    """Start a server by name once and keep it to the end of the session; skip where one is not installed."""
    running: dict[str, S3Server] = {}
    with contextlib.ExitStack() as stack:

        def get(name: str) -> S3Server:
            if name not in running:
                try:
                    running[name] = stack.enter_context({**SERVERS, **MORE_SERVERS}[name]())
                except NotInstalledError as error:
                    if name in SERVERS:
                        raise
                    pytest.skip(str(error))
            return running[name]

        yield get


@pytest.fixture(scope="session", params=sorted(SERVERS))
def s3_server(request: pytest.FixtureRequest, s3_server_named: Callable[[str], S3Server]) -> S3Server:
    """Each S3 server in turn."""
    return s3_server_named(request.param)


@pytest.fixture(scope="session")
def moto(s3_server_named: Callable[[str], S3Server]) -> S3Server:
    """The S3 server moto, which keeps most of S3's rules."""
    return s3_server_named("moto")


@pytest.fixture(scope="session")
def rclone(s3_server_named: Callable[[str], S3Server]) -> S3Server:
    """The S3 server rclone, which ignores conditions and refuses wrong credentials."""
    return s3_server_named("rclone")


@pytest.fixture(params=[*USUAL, *(pytest.param(name, marks=pytest.mark.soak) for name in SOAKED)])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, s3_server_named: Callable[[str], S3Server]
) -> Place:
    """An untouched place in a folder, on S3 and on GCS in turn, or where the user says."""
    return new_place(request.param, tmp_path, s3_server_named)


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    """An untouched place in a folder, for what no store has a part in."""
    return Place.in_folder(tmp_path / "run")


@pytest.fixture(scope="session")
def gcs() -> GCSServer:
    """The GCS server of this project's own, which keeps GCS's rules."""
    return shared_gcs_server()


@pytest.fixture(scope="session")
def fake_gcs() -> FakeGCS:
    """fake-gcs-server, which keeps conditions and takes a question about a session for its end."""
    return shared_fake_gcs_server()
