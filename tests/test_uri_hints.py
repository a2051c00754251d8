"""What users mistype: keywords in the wrong place, and URIs that lost their protocol or are web addresses."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import cloudckpt
from cloudckpt.backends.config import keywords, uri_hints
from cloudckpt.backends.config.options import Options
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointError, CheckpointNotFoundError, ConfigurationError
from support.commands import on_a_terminal, run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TAKERS: dict[str, Callable[..., Any]] = {name: getattr(cloudckpt, name) for name in keywords.OWN}
"""Every class and function that takes the options of a URI beside keywords of its own."""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri_hints._say_new_folder.cache_clear()
    keywords._warn_of_variable.cache_clear()


# Keywords


@pytest.mark.parametrize("name", TAKERS)
def test_the_keywords_that_are_suggested_are_those_that_are_taken(name: str) -> None:
    parameters = inspect.signature(TAKERS[name]).parameters.values()
    own = [one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY]
    assert keywords.OWN[name] == tuple(own)


def test_every_front_door_that_takes_options_is_known() -> None:
    doors = {
        name
        for name in cloudckpt.__all__
        if callable(door := getattr(cloudckpt, name))
        and not (isinstance(door, type) and issubclass(door, Exception))
        and "options" in inspect.signature(door).parameters
    }
    assert doors == keywords.OWN.keys()


@pytest.mark.parametrize(
    ("taker", "given", "meant"),
    [
        ("Checkpointer", "keep", "keep_last"),
        ("Checkpointer", "keep_lats", "keep_last"),
        ("Checkpointer", "every", "every_steps"),
        ("Checkpointer", "on_fail", "on_failure"),
        ("Checkpointer", "part_sise", "part_size"),
        ("Checkpointer", "endpoint", "endpoint_url"),
        ("StorageWriter", "overwite", "overwrite"),
        ("StorageWriter", "note", "notes"),
        ("StorageWriter", "concurency", "concurrency"),
        ("StorageReader", "trsut", "trust"),
        ("StorageReader", "shared", "share"),
        ("collect_garbage", "older-then", "older_than"),
        ("delete_checkpoint", "dryrun", "dry_run"),
        ("verify", "observr", "observer"),
    ],
)
def test_a_front_door_suggests_its_own_keywords_and_options(taker: str, given: str, meant: str) -> None:
    with pytest.raises(ConfigurationError, match=f"Did you mean '{meant}'") as caught:
        TAKERS[taker]("s3://bucket/run?region=here", **{given: 3})
    assert f"'{given}' of {taker}" in str(caught.value)
    assert caught.value.uri == "s3://bucket/run"


@pytest.mark.parametrize(
    ("taker", "given", "owner"),
    [("StorageWriter", "keep_last", "Checkpointer"), ("StorageReader", "notes", "StorageWriter")],
)
def test_a_keyword_of_another_front_door_is_named_as_that(taker: str, given: str, owner: str) -> None:
    with pytest.raises(ConfigurationError, match=f"'{given}' is a keyword of {owner}"):
        TAKERS[taker]("s3://bucket/run", **{given: 3})


@pytest.mark.parametrize("name", ["keep_last", "overwrite", "every_steps", "trust"])
def test_a_keyword_in_a_query_or_among_options_is_named_as_one(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"'{name}' is a keyword of Checkpointer") as caught:
        Target.parse(f"s3://bucket/run?{name}=3")
    assert "not an option of a URI" in str(caught.value)
    ran = run("ls", "s3://bucket/run", "-o", f"{name}=3")
    assert ran.status == 2 and f"'{name}' is a keyword of Checkpointer" in ran.err


@pytest.mark.parametrize("given", ["keep", "overwite"])
def test_a_query_and_the_command_line_suggest_options_alone(given: str) -> None:
    attempts: list[tuple[str, dict[str, Any]]] = [(f"?{given}=3", {}), ("", {given: 3})]
    for query, named in attempts:
        with pytest.raises(ConfigurationError) as caught:
            Target.parse(f"s3://bucket/run{query}", **named)
        hint = caught.value.hint or ""
        assert not any(f"'{name}'" in hint for names in keywords.OWN.values() for name in names)
        assert hint.startswith("Known: ") or any(f"'{name}'" in hint for name in Options.model_fields)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("CLOUDCKPT_KEEP_LAST", "keep_last is a keyword of Checkpointer"),
        ("CLOUDCKPT_PART_SISE", "did you mean the option part_size"),
        ("CLOUDCKPT_CPUS", ""),
        ("CLOUDCKPT_LIVE", ""),
    ],
)
def test_a_variable_without_effect_is_logged_once(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, "3")
    Target.parse("s3://bucket/run")
    Target.parse("s3://bucket/run")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == bool(said)
    assert all(name in message and said in message for message in messages)


# URIs


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("s3:/bucket/run", "s3://bucket/run"),
        ("s3//bucket/run", "s3://bucket/run"),
        ("S3//bucket/run", "s3://bucket/run"),
        ("gs//bucket/run?project=p", "gs://bucket/run"),
        ("gs:bucket/run", "gs://bucket/run"),
        ("s3//key:secret@bucket/run", "s3://bucket/run"),
        ("arn:aws:s3:::bucket/run/*", "s3://bucket/run"),
        ("arn:aws-cn:s3:::bucket", "s3://bucket"),
        ("https://bucket.s3.amazonaws.com/run/step-1", "s3://bucket/run/step-1"),
        ("https://my.bucket.s3.eu-central-1.amazonaws.com/run", "s3://my.bucket/run"),
        ("https://bucket.s3.dualstack.us-west-2.amazonaws.com/run", "s3://bucket/run"),
        ("https://bucket.s3-us-west-2.amazonaws.com/run/", "s3://bucket/run"),
        ("https://s3.amazonaws.com/bucket/a%20run", "s3://bucket/a run"),
        ("https://s3.cn-north-1.amazonaws.com.cn/bucket/run", "s3://bucket/run"),
        ("HTTPS://Bucket.S3.amazonaws.com/Run", "s3://bucket/Run"),
        ("https://bucket.s3.amazonaws.com/run?X-Amz-Signature=secret", "s3://bucket/run"),
        ("https://user:secret@bucket.s3.amazonaws.com/run", "s3://bucket/run"),
        ("https://s3.console.aws.amazon.com/s3/buckets/bucket?prefix=run/&region=eu", "s3://bucket/run"),
        ("https://eu-west-1.console.aws.amazon.com/s3/buckets/bucket?prefix=a/b/", "s3://bucket/a/b"),
        ("https://s3.console.aws.amazon.com/s3/object/bucket?prefix=a/.metadata", "s3://bucket/a/.metadata"),
        ("https://s3.console.aws.amazon.com/s3/buckets/bucket/run/", "s3://bucket/run"),
        ("https://storage.googleapis.com/bucket/run", "gs://bucket/run"),
        ("https://storage.cloud.google.com/bucket/run", "gs://bucket/run"),
        ("https://bucket.storage.googleapis.com/run", "gs://bucket/run"),
        (
            "https://console.cloud.google.com/storage/browser/bucket/run;tab=objects?project=p",
            "gs://bucket/run",
        ),
    ],
)
def test_an_address_of_a_bucket_is_refused_with_its_uri(given: str, meant: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Target.parse(given)
    words = (caught.value.hint or "").replace(",", " ").replace(";", " ")
    assert f"Write {meant}" in words and words.partition(meant)[2][:1] in ("", " ")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        "https://minio.example:9000/bucket/run",
        "s3/bucket",
        "./s3//bucket",
        "S3://bucket/run",
        "gs/x",
        "arn/x",
    ],
)
def test_what_is_no_mistake_is_taken(given: str) -> None:
    assert Target.parse(given).uri


# A path that looks like a bucket


def load(uri: str) -> None:
    dcp.load({"x": torch.zeros(4)}, storage_reader=cloudckpt.StorageReader(uri))


READERS: dict[str, Callable[[str], object]] = {
    "load": load,
    "delete": cloudckpt.delete_checkpoint,
    "verify": cloudckpt.verify,
    "copy": lambda uri: cloudckpt.copy_checkpoint(uri, "memory://copy"),
    "convert": lambda uri: cloudckpt.convert(uri, "memory://m.pt"),
    "Checkpointer": lambda uri: cloudckpt.Checkpointer(uri).load({"x": torch.zeros(4)}),
}


@pytest.mark.parametrize("name", READERS)
def test_a_path_that_is_not_there_and_looks_like_a_bucket_is_asked_about(name: str, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, CheckpointException)) as caught:
        READERS[name]("bucket/run")
    error: BaseException = caught.value
    if isinstance(error, CheckpointException):
        ((error, _),) = error.failures.values()
    assert isinstance(error, CheckpointNotFoundError)
    assert "Did you mean s3://bucket/run or gs://bucket/run?" in str(error)
    assert f"no folder {tmp_path}/bucket" in str(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ("ls",),
            ("show",),
            ("verify",),
            ("rm", "--yes"),
            ("gc", "--yes"),
            ("prune", "--keep-last=1", "--yes"),
        ),
        *(("pin", "--step=1"), ("cp", "memory://copy"), ("convert", "memory://m.pt")),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_ask_about_it_too(arguments: tuple[str, ...]) -> None:
    ran = run(arguments[0], "bucket/run", *arguments[1:])
    assert ran.status == 1
    assert "Did you mean s3://bucket/run or gs://bucket/run?" in ran.err


@pytest.mark.parametrize("uri", ["Folder/run", "there/run", "/nowhere/run", "memory://x"])
def test_nothing_else_is_asked_about(uri: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointNotFoundError) as caught:
        cloudckpt.delete_checkpoint(uri)
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "warns"), [("bucket/run", True), ("./bucket/run", False), ("there/run", False)]
)
def test_a_save_to_a_new_relative_folder_works_and_warns_once(
    uri: str, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "cloudckpt")
    (tmp_path / "there").mkdir()
    writer = cloudckpt.StorageWriter(uri)
    writer.set_up_storage_writer(is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    dcp.save({"x": torch.arange(4.0)}, storage_writer=writer)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("cloudckpt")]
    assert (tmp_path / uri / ".metadata").exists()
    assert len(said) == warns
    assert all(f"{tmp_path}/bucket/run" in one and "s3://bucket/run" in one for one in said)


@pytest.mark.parametrize(("typed", "status"), [("y\n", 0), ("n\n", 1)])
def test_a_command_that_writes_asks_on_a_terminal(tmp_path: Path, typed: str, status: int) -> None:
    dcp.save({"x": torch.arange(4.0)}, storage_writer=cloudckpt.StorageWriter(tmp_path / "there"))
    ran = on_a_terminal("convert", str(tmp_path / "there"), "bucket/m.pt", typed=typed)
    assert ran.status == status
    assert "instead of writing to s3://bucket/m.pt?" in " ".join(ran.out.split())
    assert (tmp_path / "bucket" / "m.pt").exists() is (status == 0)
