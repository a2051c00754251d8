"""URIs and options: what users type, where it is read, and what they are told when it can't be used."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.backends.config.target import Target, is_checkpoint_uri
from cloudckpt.backends.errors import ConfigurationError

SECRET = "wJalrXUtnFEMI"  # noqa: S105 - nobody's


@pytest.fixture(autouse=True)
def _no_options_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CLOUDCKPT_")]:
        monkeypatch.delenv(name)


# Where options come from


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 1048576),
        ("64MiB", 64 << 20),
        ("8MB", 8_000_000),
        ("1.5GiB", 3 << 29),
        ("64mib", 64 << 20),
        pytest.param(1 << 20, 1 << 20, id="a number"),
    ],
)
def test_sizes_are_read_in_units(text: str | int, size: int) -> None:
    assert Target.parse("s3://bucket/x", part_size=text).options.part_size == size
    assert Target.parse(f"s3://bucket/x?part_size={text}").options.part_size == size


def test_keywords_win_over_the_query_and_the_query_over_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLOUDCKPT_PART_SIZE", "1MiB")
    monkeypatch.setenv("CLOUDCKPT_CONCURRENCY", "2")
    monkeypatch.setenv("CLOUDCKPT_REGION", "environment")
    options = Target.parse("s3://bucket/x?part_size=2MiB&concurrency=3", part_size="3MiB").options
    assert (options.part_size, options.concurrency, options.region) == (3 << 20, 3, "environment")


def test_a_keyword_of_none_is_not_given() -> None:
    options = Target.parse(
        "s3://bucket/x?region=there", region=None, part_size=None, concurrency=None
    ).options
    assert (options.region, options.part_size, options.concurrency) == ("there", None, 8)


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDCKPT_REGION", "first")
    target = Target.parse("s3://bucket/x")
    monkeypatch.setenv("CLOUDCKPT_REGION", "second")
    assert target.moved_to("s3://bucket/y").options.region == "first"
    assert target.child("z").options.region == "first"


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("1", True), ("0", False)])
def test_flags_are_read_from_a_query(text: str, value: bool) -> None:
    assert Target.parse(f"s3://bucket/x?requester_pays={text}").options.requester_pays is value


def test_percent_escapes_are_read_in_a_query_and_a_plus_is_a_plus() -> None:
    target = Target.parse("s3://bucket/x?endpoint_url=http%3A%2F%2F127.0.0.1%3A9000%2F&region=a+b%20c")
    assert target.options.endpoint_url == "http://127.0.0.1:9000/"
    assert target.options.region == "a+b c"


def test_an_endpoint_needs_no_escapes() -> None:
    target = Target.parse("s3://bucket/x?endpoint_url=http://127.0.0.1:9000&part_size=64MiB")
    assert target.options.endpoint_url == "http://127.0.0.1:9000"
    assert target.uri == "s3://bucket/x"


# What is refused, and how


@pytest.mark.parametrize(
    ("uri", "keywords", "words"),
    [
        ("s3://bucket/x?part_sise=1", {}, ["part_sise", "Did you mean 'part_size'?"]),
        ("s3://bucket/x", {"concurency": 1}, ["concurency", "Did you mean 'concurrency'?"]),
        ("s3://bucket/x", {"endpoint-url": "http://h"}, ["Did you mean 'endpoint_url'?"]),
        ("s3://bucket/x", {"dishwasher": 1}, ["unknown", "dishwasher", "Known:", "storage_class"]),
        ("s3://bucket/x?region=a&region=b", {}, ["region", "twice"]),
        ("s3://bucket/x?region=", {}, ["region", "no value"]),
        ("s3://bucket/x?region", {}, ["region", "no value"]),
        ("s3://bucket/x?storage_options={}", {}, ["storage_options", "keyword only"]),
        ("s3://bucket/x?part_size=0", {}, ["part_size", "'0'", "64MiB"]),
        ("s3://bucket/x?part_size=12parsecs", {}, ["part_size", "'12parsecs'", "64MiB"]),
        ("s3://bucket/x", {"part_size": -5}, ["part_size", "-5"]),
        ("s3://bucket/x?concurrency=0", {}, ["concurrency", "'0'", "at least 1"]),
        ("s3://bucket/x?concurrency=many", {}, ["concurrency", "'many'", "whole number"]),
        ("s3://bucket/x?memory_limit=1023KiB", {}, ["memory_limit", "'1023KiB'", "at least 1MiB"]),
        ("s3://bucket/x?timeout=0", {}, ["timeout", "greater than 0"]),
        ("s3://bucket/x?timeout=inf", {}, ["timeout", "seconds"]),
        ("s3://bucket/x", {"timeout": float("nan")}, ["timeout", "seconds"]),
        ("s3://bucket/x?retries=-1", {}, ["retries", "'-1'", "at least 0"]),
        ("s3://bucket/x?requester_pays=perhaps", {}, ["requester_pays", "'perhaps'", "true or false"]),
        ("s3://bucket/x?checksum=md5", {}, ["checksum", "'md5'", "crc64nvme"]),
        ("s3://bucket/x?endpoint_url=127.0.0.1:9000", {}, ["endpoint_url", "http://"]),
        ("s3://bucket/x", {"storage_options": [1]}, ["storage_options", "dict"]),
        ("file:///x?sse=AES256", {}, ["sse", "file://"]),
        ("/x", {"endpoint_url": "http://h"}, ["endpoint_url", "file://"]),
        ("memory://x", {"storage_options": {"a": 1}}, ["storage_options", "memory://"]),
        ("s3://bucket/x", {"kms_key_name": "k"}, ["kms_key_name", "s3://"]),
        ("gs://bucket/x?sse=AES256", {}, ["sse", "gs://"]),
        ("gs://bucket/x?checksum=crc64nvme", {}, ["checksum", "gs://", "crc32c"]),
        ("/x", {"checksum": "crc32c"}, ["checksum", "file://"]),
    ],
)
def test_an_option_that_can_not_be_used_is_named_with_what_is_allowed(
    uri: str, keywords: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Target.parse(uri, **keywords)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.uri is not None
    assert "?" not in caught.value.uri


def test_a_bad_value_in_the_environment_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDCKPT_CONCURRENCY", "some")
    with pytest.raises(ConfigurationError, match=r"CLOUDCKPT_CONCURRENCY is 'some'"):
        Target.parse("s3://bucket/x")
    assert Target.parse("s3://bucket/x", concurrency=4).options.concurrency == 4


def test_what_a_store_can_not_honour_does_not_apply_when_it_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLOUDCKPT_SSE", "aws:kms")
    monkeypatch.setenv("CLOUDCKPT_CHECKSUM", "crc64nvme")
    options = Target.parse("/folder").options
    assert (options.sse, options.checksum) == (None, "auto")
    options = Target.parse("s3://bucket/x").options
    assert (options.sse, options.checksum) == ("aws:kms", "crc64nvme")


@pytest.mark.parametrize(
    "query",
    [
        f"key={SECRET}",
        f"secret={SECRET}",
        f"token={SECRET}",
        f"region=x&SECRET={SECRET}",
        f"aws_access_key_id={SECRET}",
        f"aws_secret_access_key={SECRET}",
        f"aws-session-token={SECRET}",
        f"access_key={SECRET}",
        f"password={SECRET}",
        f"%6bey={SECRET}",
        f"X-Amz-Signature={SECRET}",
    ],
)
@pytest.mark.parametrize("root", ["s3://bucket/x", "gs://bucket/x", "ftp://host/x"])
def test_a_credential_in_a_uri_is_refused_and_not_repeated(root: str, query: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Target.parse(f"{root}?{query}")
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(vars(caught.value))
    assert caught.value.__cause__ is None
    assert "redential" in str(caught.value)


@pytest.mark.parametrize(
    "uri", [f"s3://me:{SECRET}@bucket/x", f"gs://{SECRET}@bucket/x", f"ftp://me:{SECRET}@h/x"]
)
def test_credentials_before_the_bucket_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigurationError, match=r"[Cc]redentials") as caught:
        Target.parse(uri)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("127.0.0.1:9000", ["no scheme", "Write http://127.0.0.1:9000 or", "https://127.0.0.1:9000"]),
        ("localhost:9000", ["no scheme", "http://localhost:9000"]),
        ("s3.example.com", ["no scheme", "https://s3.example.com"]),
        ("//host:1", ["no scheme", "http://host:1"]),
        ("s3://x", ["scheme s3", "https://"]),
        ("https://", ["no host"]),
        ("http://:9000", ["no host"]),
        ("http://[::1", ["malformed", "brackets"]),
        ("http://host:99999", ["malformed", "65535"]),
        ("http://host:port", ["malformed"]),
        ("http://host name:9000", ["white space"]),
        ("http://host\n:9000", ["white space"]),
        ("http://ho$t:9000", ["'ho$t'"]),
        ("http://a..b", ["'a..b'"]),
    ],
)
@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_a_malformed_endpoint_is_refused_with_the_way_to_write_it(
    monkeypatch: pytest.MonkeyPatch, protocol: str, endpoint: str, words: list[str]
) -> None:
    def environment() -> Target:
        monkeypatch.setenv("CLOUDCKPT_ENDPOINT_URL", endpoint)
        return Target.parse(f"{protocol}://bucket/x")

    def keyword() -> Target:
        return Target.parse(f"{protocol}://bucket/x", endpoint_url=endpoint)

    for parse, name in ((keyword, "'endpoint_url'"), (environment, "CLOUDCKPT_ENDPOINT_URL")):
        with pytest.raises(ConfigurationError) as caught:
            parse()
        for word in (*words, name):
            assert word in str(caught.value)


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://127.0.0.1:9000/",
        "https://[::1]:9000",
        "http://minio_1:9000",
        "https://s3.example.com./storage/v1/s3",
    ],
)
def test_an_endpoint_may_be_a_name_an_address_or_below_a_path(endpoint: str) -> None:
    assert Target.parse("s3://bucket/x", endpoint_url=endpoint).options.endpoint_url == endpoint


_POINT = "arn:aws:s3:us-east-1:123456789012:accesspoint/name"


@pytest.mark.parametrize("arn", [_POINT, _POINT.replace("accesspoint/", "accesspoint:")])
def test_an_access_point_s_arn_is_a_bucket(arn: str) -> None:
    target = Target.parse(f"s3://{arn}/a/run?region=us-east-1")
    assert (target.bucket, target.path, target.uri) == (arn, "a/run", f"s3://{arn}/a/run")
    assert Target.parse(target.uri).bucket == arn
    assert target.child("step-1").path == "a/run/step-1"
    assert target.parted()[0].uri == f"s3://{arn}/a"
    assert (Target.parse(f"s3://{arn}").bucket, Target.parse(f"s3://{arn}/").path) == (arn, "")
    assert Target.parse("s3://name-abcdefgh123-s3alias/run").bucket == "name-abcdefgh123-s3alias"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://arn:aws:s3:::bucket/run", ["Write s3://bucket/run"]),
        ("s3://arn:aws-cn:s3:::bucket", ["Write s3://bucket"]),
        ("s3://arn:aws:s3::123456789012:accesspoint/x.mrap/run", ["multi-region", "alias"]),
        ("s3://arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-1/accesspoint/n/run", ["Outposts"]),
        ("s3://arn:aws:s3-object-lambda:us-east-1:123456789012:accesspoint/n/run", ["Object Lambda"]),
        ("s3://arn:aws:s3express:us-east-1:123456789012:bucket/b--x--x-s3", ["directory bucket"]),
        ("s3://arn:aws:iam::123456789012:role/x", ["access point"]),
        ("s3://arn:aws:s3:us-east-1:123456789012:accesspoint/UPPER/run", ["access point"]),
        ("arn:aws:s3:::bucket/run", ["s3://"]),
        ("gs://arn:aws:s3:::bucket/run", ["not a bucket's name"]),
    ],
)
def test_another_arn_is_refused_by_its_kind(uri: str, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Target.parse(uri)
    for word in words:
        assert word in str(caught.value)


def test_a_credential_in_an_endpoint_is_refused_and_not_repeated() -> None:
    endpoint = f"http://me:{SECRET}@127.0.0.1:9000"
    for uri, keywords in (
        (f"s3://bucket/x?endpoint_url={endpoint}", {}),
        ("s3://bucket/x", {"endpoint_url": endpoint}),
    ):
        with pytest.raises(ConfigurationError, match="without credentials") as caught:
            Target.parse(uri, **keywords)
        assert SECRET not in str(caught.value)


def test_the_hint_says_where_credentials_belong() -> None:
    with pytest.raises(ConfigurationError, match=r"~/\.aws/credentials"):
        Target.parse("s3://bucket/x?key=a")
    with pytest.raises(ConfigurationError, match="Application Default Credentials"):
        Target.parse("gs://bucket/x?token=a")


def test_a_credential_as_a_keyword_is_sent_to_storage_options_and_not_repeated() -> None:
    with pytest.raises(ConfigurationError, match="storage_options") as caught:
        Target.parse("s3://bucket/x", secret=SECRET)
    assert SECRET not in str(caught.value)


def test_secrets_never_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDCKPT_TOKEN", SECRET)
    for target in (
        Target.parse("gs://bucket/x"),
        Target.parse("gs://bucket/x", token=SECRET),
        Target.parse("s3://bucket/x", storage_options={"secret": SECRET}),
    ):
        assert SECRET not in repr(target)
        assert SECRET not in str(target.options)
        assert SECRET not in repr(target.layers)
    with pytest.raises(ConfigurationError) as caught:
        Target.parse("gs://bucket/x", token=[SECRET])
    assert SECRET not in str(caught.value)


# URIs


@pytest.mark.parametrize(
    ("given_uri", "uri", "protocol", "bucket", "path"),
    [
        ("s3://bucket", "s3://bucket", "s3", "bucket", ""),
        ("s3://bucket/", "s3://bucket", "s3", "bucket", ""),
        ("s3://bucket/run/step-1/", "s3://bucket/run/step-1", "s3", "bucket", "run/step-1"),
        ("S3://bucket/Run", "s3://bucket/Run", "s3", "bucket", "Run"),
        ("s3a://bucket/x", "s3://bucket/x", "s3", "bucket", "x"),
        ("s3://bucket/a%20b c+d", "s3://bucket/a%20b c+d", "s3", "bucket", "a%20b c+d"),
        ("gs://bucket/x?anon=true", "gs://bucket/x", "gs", "bucket", "x"),
        ("gcs://bucket/x", "gs://bucket/x", "gs", "bucket", "x"),
        ("file:///a/b/", "file:///a/b", "file", "", "/a/b"),
        ("file:///a//b", "file:///a/b", "file", "", "/a/b"),
        ("file://localhost/a", "file:///a", "file", "", "/a"),
        ("file:///a%20b%3Fc", "file:///a b%3Fc", "file", "", "/a b?c"),
        ("file:///a?concurrency=2", "file:///a", "file", "", "/a"),
        ("/a b/?x#y%20", "file:///a b/%3Fx%23y%2520", "file", "", "/a b/?x#y%20"),
        ("//a", "file:///a", "file", "", "/a"),
        ("memory://name", "memory://name", "memory", "", "/name"),
        ("memory://name/run/", "memory://name/run", "memory", "", "/name/run"),
        ("ftp://me@host/run", "ftp://me@host/run", "ftp", "", "/run"),
    ],
)
def test_a_uri_has_one_canonical_form(
    given_uri: str, uri: str, protocol: str, bucket: str, path: str
) -> None:
    target = Target.parse(given_uri)
    assert (target.uri, target.protocol, target.bucket, target.path) == (uri, protocol, bucket, path)
    again = Target.parse(target.uri)
    assert (again.uri, again.path) == (uri, path)


def test_plain_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Target.parse("runs/./one/../two").path == str(tmp_path / "runs/two")
    assert Target.parse("./a:b").path == str(tmp_path / "a:b")
    assert Target.parse("../x").path == str(tmp_path.parent / "x")
    assert Target.parse("~/x").path == str(tmp_path / "home/x")
    assert Target.parse(tmp_path / "x").uri == f"file://{tmp_path}/x"


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_the_uri_of_any_path_leads_back_to_it(name: str) -> None:
    path = os.path.abspath("/" + name)  # noqa: PTH100 - the promise is about spelling, not about links
    if "://" not in path:
        target = Target.parse(path)
        assert target.path == "/" + path.lstrip("/")
        if not target.uri[-1].isspace():
            assert Target.parse(target.uri).path == target.path


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("", ["empty"]),
        ("  ", ["empty"]),
        ("s3://", ["bucket is missing"]),
        ("s3:///x", ["bucket is missing", "s3://bucket/prefix"]),
        ("s3:/bucket/x", ["two slashes", "s3://bucket/x"]),
        (Path("s3://bucket/x"), ["two slashes", "pathlib"]),
        ("file:/a", ["two slashes", "file:///a"]),
        ("file://a/b", ["three slashes"]),
        ("s4://bucket/x", ["'s4'", "s3://"]),
        ("gss://bucket/x", ["'gss'", "gs://"]),
        ("banana://x", ["'banana'", "s3://bucket/prefix"]),
        ("s3://bucket/../x", [".."]),
        ("s3://bucket/%2e%2e/x", [".."]),
        ("file:///a/../b", [".."]),
        ("s3://bucket//x", ["two slashes together"]),
        ("s3://bucket/x#y", ["fragment"]),
        ("s3://bucket/x ", ["white space"]),
        (" s3://bucket/x", ["://"]),
        ("s3://my bucket/x", ["'my bucket'", "not a bucket's name"]),
        ("s3://127.0.0.1:9000/bucket", ["endpoint_url"]),
        ("simplecache::s3://bucket/x", ["chained"]),
        ("memory://", ["names nothing"]),
        ("a\0b", ["NUL"]),
    ],
)
def test_a_typo_in_a_uri_is_explained(uri: str | Path, words: list[str]) -> None:
    assert not is_checkpoint_uri(uri)
    with pytest.raises(ConfigurationError) as caught:
        Target.parse(uri)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    ["s3://bucket/x", "gs://bucket", "file:///x", "/x", "x", Path("x"), "memory://x", "s3://bucket?anon=1"],
)
def test_what_the_contract_lists_is_a_checkpoint_uri(uri: str | Path) -> None:
    assert is_checkpoint_uri(uri)


def test_a_protocol_whose_library_is_missing_is_a_checkpoint_uri_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "adlfs", None)
    assert is_checkpoint_uri("abfs://container/x")
    with pytest.raises(ConfigurationError, match="adlfs"):
        Target.parse("abfs://container/x")


# Targets as values


def test_a_target_pickles_with_everything_and_can_still_move() -> None:
    target = Target.parse(
        "s3://bucket/x?region=here", part_size="5MiB", storage_options={"key": "a", "secret": SECRET}
    )
    copy = pickle.loads(pickle.dumps(target))
    assert copy == target
    moved = copy.moved_to("s3://other/y?concurrency=2")
    assert moved.uri == "s3://other/y"
    assert moved.options == target.options.model_copy(update={"concurrency": 2})


def test_moving_keeps_keywords_before_the_new_query_and_that_before_the_old() -> None:
    target = Target.parse("s3://bucket/x?region=old&concurrency=2", concurrency=3)
    moved = target.moved_to("s3://bucket/y?region=new&concurrency=9")
    assert (moved.options.region, moved.options.concurrency) == ("new", 3)
    assert moved.moved_to("s3://bucket/z").options == moved.options


def test_moving_to_another_protocol_leaves_the_old_query_behind() -> None:
    target = Target.parse("s3://bucket/x?endpoint_url=http://h:1", part_size="5MiB")
    moved = target.moved_to("/folder")
    assert (moved.options.endpoint_url, moved.options.part_size) == (None, 5 << 20)


@pytest.mark.parametrize(
    ("root", "uri", "path"),
    [
        ("s3://bucket", "s3://bucket/a/b c", "a/b c"),
        ("s3://bucket/run?region=r", "s3://bucket/run/a/b c", "run/a/b c"),
        ("/run", "file:///run/a/b c", "/run/a/b c"),
        ("/", "file:///a/b c", "/a/b c"),
        ("memory://run", "memory://run/a/b c", "/run/a/b c"),
    ],
)
def test_a_child_lies_below_with_the_same_options(root: str, uri: str, path: str) -> None:
    target = Target.parse(root, concurrency=3)
    child = target.child("a/b c")
    assert (child.uri, child.path, child.options) == (uri, path, target.options)
    assert Target.parse(child.uri).path == path


@pytest.mark.parametrize("name", ["", "..", "a/../b", "/a", "a/"])
def test_a_child_is_never_elsewhere(name: str) -> None:
    with pytest.raises(ConfigurationError):
        Target.parse("s3://bucket/x").child(name)


def test_options_do_not_change() -> None:
    options = Target.parse("s3://bucket/x").options
    with pytest.raises(pydantic.ValidationError):
        options.concurrency = 1  # type: ignore[misc]


# Opening


def test_a_store_whose_library_is_missing_names_the_extra() -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(["s3fs", "boto3", "botocore"]))
from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.config.target import Target
try:
    open_store(Target.parse("s3://bucket/x", region="here"))
except ConfigurationError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "pip install" in done.stdout and "s3fs" in done.stdout and "cloudckpt[" not in done.stdout
    assert "s3://bucket/x" in done.stdout


def test_a_target_is_taken_as_it_is_and_with_no_more_options() -> None:
    target = Target.parse("s3://bucket/run", part_size="8MiB")
    assert Target.parse(target) is target
    with pytest.raises(ConfigurationError, match="region"):
        Target.parse(target, region="eu-central-1")
