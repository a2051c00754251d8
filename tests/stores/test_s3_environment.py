"""Endpoints, regions and access points as the AWS environment and configuration give them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from cloudckpt import Checkpointer
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointError, ConfigurationError
from cloudckpt.backends.manage.gc import collect_garbage
from cloudckpt.backends.stores.s3.store import S3Store
from support.answers import serving
from support.places import Place
from support.proxy import Proxy, Request, SendAs, Spoiling, proxied
from support.servers import S3Server

_SCOPE = re.compile(r"Credential=[^/]+/\d{8}/(?P<region>[^/]+)/(?P<service>[^/]+)/")
_ROLE = "arn:aws:iam::123456789012:role/trainer"
_POINT = "arn:aws:s3:us-east-1:123456789012:accesspoint/point"


@pytest.fixture(scope="module")
def proxy(moto: S3Server) -> Iterator[Proxy]:
    with proxied(moto.endpoint) as made:
        yield made


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, proxy: Proxy) -> pytest.MonkeyPatch:
    """An environment and configuration of AWS with nothing in them but the proxy as the endpoint."""
    proxy.forget()
    for name in (
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_PROFILE",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    return monkeypatch


def signed_for(proxy: Proxy, service: str) -> set[str]:
    """Return the regions that the requests to a service were signed for."""
    scopes = (_SCOPE.search(request.headers.get("authorization", "")) for request in proxy.all())
    return {scope["region"] for scope in scopes if scope is not None and scope["service"] == service}


@pytest.mark.parametrize(
    ("variables", "options", "region"),
    [
        ({"AWS_REGION": "eu-west-1"}, {}, "eu-west-1"),
        ({"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-north-1"}, {}, "eu-north-1"),
        ({"AWS_REGION": "eu-west-1"}, {"region": "eu-south-1"}, "eu-south-1"),
    ],
)
def test_a_role_is_assumed_in_the_region_of_the_environment(  # noqa: PLR0917 - fixtures
    outside: pytest.MonkeyPatch,
    tmp_path: Path,
    moto: S3Server,
    proxy: Proxy,
    variables: dict[str, str],
    options: dict[str, str],
    region: str,
) -> None:
    (tmp_path / "config").write_text(
        f"[profile base]\naws_access_key_id=a\naws_secret_access_key=b\n"
        f"[profile job]\nrole_arn={_ROLE}\nsource_profile=base\n"
    )
    for name, value in variables.items():
        outside.setenv(name, value)
    store = S3Store(Target.parse(f"s3://{moto.new_bucket()}/run", profile="job", **options))
    assert not store.holds("x")  # by botocore
    assert store.list().objects == ()  # by s3fs
    assert signed_for(proxy, "sts") == signed_for(proxy, "s3") == {region}
    store.close()


def test_a_web_identity_is_exchanged_in_the_region_of_the_environment(
    outside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Find the address of STS by the proxy that is to connect to it: the request itself is not signed."""
    (tmp_path / "token").write_text("a token")
    outside.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    outside.setenv("AWS_ROLE_ARN", _ROLE)
    outside.setenv("AWS_MAX_ATTEMPTS", "1")
    outside.setenv("AWS_REGION", "eu-west-1")
    outside.delenv("AWS_ENDPOINT_URL")
    asked: list[str] = []

    class Refusing(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            asked.append(self.path)
            self.send_error(502)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in the base class
            """Stay silent."""

    with serving(Refusing) as url:
        outside.setenv("HTTPS_PROXY", url)
        store = S3Store(Target.parse("s3://bucket/run", retries=0))
        with pytest.raises(CheckpointError):
            store.holds("x")
        store.close()
    assert set(asked) == {"sts.eu-west-1.amazonaws.com:443"}


MALFORMED = {
    "127.0.0.1:9000": ["has no scheme", "Write http://127.0.0.1:9000"],
    "http://user:canary@host:1": ["has credentials"],
    "http://[::1": ["malformed"],
    "http://minio_1:9000": ["'minio_1'", "underscore"],
    "ftp://host": ["scheme ftp"],
}


@pytest.mark.parametrize("source", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "profile", "services"])
@pytest.mark.parametrize("endpoint", MALFORMED)
def test_a_malformed_endpoint_is_refused_where_it_is_configured(
    outside: pytest.MonkeyPatch, tmp_path: Path, source: str, endpoint: str
) -> None:
    outside.delenv("AWS_ENDPOINT_URL")
    named = source
    if source == "profile":
        (tmp_path / "config").write_text(f"[default]\nendpoint_url = {endpoint}\n")
    elif source == "services":
        configuration = f"[default]\nservices = own\n[services own]\ns3 =\n  endpoint_url = {endpoint}\n"
        (tmp_path / "config").write_text(configuration)
        named = "[services own]"
    else:
        outside.setenv(source, endpoint)
    checkpointer = Checkpointer("s3://bucket/run", storage_options={"key": "a", "secret": "b"})
    with checkpointer, pytest.raises(ConfigurationError) as caught:
        checkpointer.latest_step()
    for word in (named, "s3://bucket/run", *MALFORMED[endpoint]):
        assert word in str(caught.value)
    assert "canary" not in str(caught.value)


def test_a_malformed_endpoint_that_is_not_used_does_no_harm(
    outside: pytest.MonkeyPatch, moto: S3Server, proxy: Proxy
) -> None:
    outside.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    options: dict[str, Any] = {"region": "us-east-1", "storage_options": moto.storage_options}
    bucket = moto.new_bucket()
    for variables, own in (
        ({}, {"endpoint_url": proxy.endpoint}),
        ({"AWS_ENDPOINT_URL_S3": proxy.endpoint}, {}),
    ):
        for name, value in variables.items():
            outside.setenv(name, value)
        store = S3Store(Target.parse(f"s3://{bucket}/run", **options, **own))
        assert not store.holds("x")
        store.close()


@pytest.mark.parametrize("named", ["my.dotted.bucket", "plain-bucket"])
def test_an_address_as_endpoint_gets_the_bucket_in_the_path(
    outside: pytest.MonkeyPatch, moto: S3Server, proxy: Proxy, named: str
) -> None:
    moto.client().create_bucket(Bucket=named)
    virtual = {"config_kwargs": {"s3": {"addressing_style": "virtual"}}}
    options: dict[str, Any] = {"region": "us-east-1", "storage_options": {**moto.storage_options, **virtual}}
    store = S3Store(Target.parse(f"s3://{named}/run", **options))
    assert not store.holds("x") and store.list().objects == ()
    assert all(request.target.startswith(f"/{named}") for request in proxy.all())
    store.close()


def test_a_run_lives_behind_an_access_point(
    outside: pytest.MonkeyPatch, moto: S3Server, proxy: Proxy
) -> None:
    """Send every request to the access point's host, signed for its region, through a forward proxy."""
    outside.delenv("AWS_ENDPOINT_URL")
    bucket = moto.new_bucket()
    hosts: set[str] = set()

    def forward(request: Request) -> Spoiling:
        parts = urlsplit(request.target)
        hosts.add(parts.netloc)
        return SendAs(f"/{bucket}{parts.path}" + (f"?{parts.query}" if parts.query else ""))

    proxy.rule(forward)
    options: dict[str, Any] = {
        "region": "eu-west-1",
        "storage_options": {
            **moto.storage_options,
            "use_ssl": False,
            "config_kwargs": {"proxies": {"http": proxy.endpoint}},
        },
    }
    uri = f"s3://{_POINT}/a/run"
    with Checkpointer(uri, keep_last=1, progress=False, **options) as checkpointer:
        for step in (1, 2):
            assert checkpointer.save(step, {"w": torch.ones(3)}).uri == f"{uri}/step-{step:010}"
        loaded = {"w": torch.zeros(3)}
        assert checkpointer.load(loaded) == 2 and bool(loaded["w"].all())
        assert checkpointer.all_steps() == [2]
    collect_garbage(uri, **options)
    assert hosts == {"point-123456789012.s3-accesspoint.us-east-1.amazonaws.com"}
    assert signed_for(proxy, "s3") == {"us-east-1"}
    assert Place.on_server(moto, bucket).child("a/run").visible()
