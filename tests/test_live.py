"""`make live` on places of this machine: all is tried, nothing is left, and it asks what it says it will."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from live.suites import SUITES, asked_by_benchmark
from support.gcs import GCSServer
from support.outsiders import OnGCS, OnS3
from support.proxy import Proxy, proxied
from support.servers import MORE_SERVERS, SERVERS, S3Server

ROOT = Path(__file__).resolve().parents[1]
READING = {"GetObject", "HeadObject"}
USUAL = [suite.name for suite in SUITES if not suite.long]
FREE = {"DeleteObject", "DeleteObjects", "AbortMultipartUpload"}


def make_live(uri: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "live", uri, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTEST_ADDOPTS": "", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_all_passed(ran: subprocess.CompletedProcess[str], *suites: str) -> None:
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.rstrip().endswith("==> all of it passed")
    assert re.search(r"^==> below \S+ nothing is left$", ran.stdout, re.MULTILINE)
    for suite in suites:
        assert f"==> {suite}\n" in ran.stdout
    assert len(re.findall(r"^\d+ passed", ran.stdout, re.MULTILINE)) == len(
        {*suites} - {"doctor", "benchmark"}
    )


@pytest.fixture
def counting(moto: S3Server) -> Iterator[Proxy]:
    with proxied(moto.endpoint) as proxy:
        yield proxy


@pytest.mark.soak
def test_a_choice_on_an_s3_server(moto: S3Server) -> None:
    bucket = moto.new_bucket()
    ran = make_live(f"s3://{bucket}/mine", "--only", "conformance", **moto.environment)
    assert_all_passed(ran, "doctor", "conformance")
    assert "At list prices (Amazon S3, Standard): $0.01 for requests" in ran.stdout
    assert OnS3(moto, bucket, "").visible() == set()


def test_a_place_where_no_job_can_checkpoint_is_not_tried_further(moto: S3Server) -> None:
    ran = make_live("s3://no-such-bucket/mine", "--only", "conformance", **moto.environment)
    assert ran.returncode == 1
    assert "==> the rest was not tried" in ran.stdout
    assert "==> conformance" not in ran.stdout


def test_memory_is_refused() -> None:
    ran = make_live("memory://mine")
    assert (ran.returncode, ran.stdout.splitlines()[:1]) == (
        2,
        ["memory:// is of one process, and this takes many: name a folder, a bucket or a server"],
    )


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_everything_on_an_s3_server_asks_what_it_says(moto: S3Server, counting: Proxy) -> None:
    bucket = moto.new_bucket()
    where = f"s3://{bucket}/mine?endpoint_url={counting.endpoint}&region=us-east-1"
    extent = "--gib 0.5 --small 200 --repeats 2"
    for name, asked in {
        **{suite.name: suite.asked for suite in SUITES},
        "benchmark": asked_by_benchmark(0.5, 200, 2),
    }.items():
        counting.forget()
        ran = make_live(where, "--only", name, "--bench", extent, **moto.environment)
        assert_all_passed(ran, name)
        counts = Counter(request.operation for request in counting.all())
        reading = sum(counts[operation] for operation in READING)
        writing = counts.total() - reading - sum(counts[operation] for operation in FREE)
        print(f"{name}: {writing} that write or list, {reading} that read; said {asked}")  # noqa: T201
        assert writing <= 1.3 * asked.writing + 100, counts
        assert reading <= 1.3 * asked.reading + 200, counts
    assert OnS3(moto, bucket, "").visible() == OnS3(moto, bucket, "").pending() == set()


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", sorted({*SERVERS, *MORE_SERVERS} - {"moto"}))
def test_everything_on_each_other_s3_server(s3_server_named: Callable[[str], S3Server], name: str) -> None:
    server = s3_server_named(name)
    bucket = server.new_bucket()
    ran = make_live(f"s3://{bucket}/mine", "--bench", "--gib 0.2 --repeats 1", **server.environment)
    assert_all_passed(ran, "doctor", *USUAL, "benchmark")
    assert {name for name in OnS3(server, bucket, "").visible() if not name.endswith("/")} == set()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_everything_in_a_folder(tmp_path: Path) -> None:
    ran = make_live(str(tmp_path), "--bench", "--gib 0.2 --repeats 1")
    assert_all_passed(ran, "doctor", *USUAL, "benchmark")
    assert "skipped" not in ran.stdout
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_everything_on_a_gcs_server(gcs: GCSServer) -> None:
    bucket = gcs.new_bucket()
    where = f"gs://{bucket}/mine?endpoint_url={gcs.endpoint}&anon=true"
    ran = make_live(where, "--bench", "--gib 0.2 --repeats 1")
    assert_all_passed(ran, "doctor", *USUAL, "benchmark")
    assert OnGCS(gcs, bucket, "").visible() == set()
