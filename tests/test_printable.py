"""Names come from whoever wrote a checkpoint: none begins a line of its own in a log or steers a terminal."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointError, IntegrityError, StorageError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.manage.delete import delete_checkpoint
from cloudckpt.backends.save.commit import find_previous
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Create, Overwrite
from cloudckpt.backends.system.printable import lines, one_line
from cloudckpt.retention import drop
from cloudckpt.run import Run
from support.commands import run
from support.places import Place

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

EVIL = "w\n2026-01-01 ERROR root: all is lost\r\x1b[31m\u202egnp\u2028\x85\x00"
"""A name with a line of a log in it, a colour, an override of direction, and other separators of lines."""
IN_A_PATH = EVIL.replace("\0", "")


def assert_harmless(text: str) -> None:
    for line in text.splitlines():
        assert line.isprintable(), ascii(line)
        assert not line.startswith("2026-01-01"), ascii(line)


@pytest.mark.parametrize("text", ["", "plain", "größer 模型 🙂", "back\\slash", EVIL, "\ud800", "\x7f\t"])
def test_a_name_is_one_printable_line_and_plain_ones_stay_as_they_are(text: str) -> None:
    assert one_line(text).isprintable()
    assert (one_line(text) == text) is text.isprintable()
    assert lines(f"{text}\nmore").splitlines()[-1] == "more"


@pytest.mark.parametrize("field", ["message", "uri", "object_name", "hint"])
def test_an_error_is_one_line_and_its_fields_are_as_they_were(field: str) -> None:
    given: dict[str, Any] = {"message": "it failed", field: EVIL}
    error = StorageError(given.pop("message"), **given)
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert str(one).isprintable() and "all is lost" in str(one)
        assert getattr(one, field) == EVIL


def evil_metadata(place: Place) -> None:
    """Commit a checkpoint whose metadata names data objects, and keys, with such names."""
    dcp.save({IN_A_PATH: torch.arange(4.0), "b": 3}, storage_writer=place.writer())
    with open_store(Target.parse(place.uri, **place.options)) as store:
        data, _ = store.get(md.METADATA_NAME)
        metadata = md.load(data, uri=store.uri)
        for index, stored in list(metadata.storage_data.items()):
            stored.relative_path = IN_A_PATH if index.fqn == "b" else f"deeper\n/{stored.relative_path}"
        store.put(md.METADATA_NAME, md.dump(metadata), Overwrite())


def test_names_in_metadata_reach_neither_the_log_nor_errors_raw(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    there = place.child("run" if place.server else "ru\nn")  # GCS takes no such names
    evil_metadata(there)
    with pytest.raises(CheckpointException) as caught:
        dcp.load({IN_A_PATH: torch.zeros(4), "b": 0}, storage_reader=there.reader())
    ((failure, _),) = caught.value.failures.values()
    assert_harmless(str(failure))
    delete_checkpoint(there.uri, **there.options)
    assert "stay behind" in caplog.text
    for record in caplog.records:
        if record.name.startswith("cloudckpt"):
            assert_harmless(record.getMessage())
            assert "\n" not in record.getMessage()


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("ls", []),
        ("show", []),
        ("verify", []),
        ("diff", []),
        ("rm", ["--dry-run"]),
        ("gc", ["--older-than", "0s", "--dry-run"]),
        ("pin", ["--step", "5"]),
        ("cp", []),
        ("convert", ["--to", "torch"]),
    ],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_commands_print_names_on_one_line(
    folder: Place, command: str, arguments: list[str], as_json: bool
) -> None:
    there = folder.child("ru\nn\x1b[31m")
    evil_metadata(there)
    with open_store(Target.parse(there.uri)) as store:
        store.put(f"{IN_A_PATH}/__0_0.{'a' * 32}.distcp", b"orphan", Create())
    more = {"cp": [f"{folder.uri}/copy"], "convert": [f"{folder.uri}/m\n.pt"], "diff": [there.uri]}
    ran = run(command, there.uri, *more.get(command, []), *arguments, *(["--json"] if as_json else []))
    assert ran.out or ran.err
    assert_harmless(ran.err)
    if as_json and ran.out:
        assert ran.out.isascii()
        json.loads(ran.out)
    else:
        assert_harmless(ran.out)


def test_deleting_a_step_logs_its_uri_on_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    here = Run(Target.parse(tmp_path / "ru\nn"))
    dcp.save({"x": torch.arange(4.0)}, storage_writer=cloudckpt.StorageWriter(here.at(1)))
    drop(here, 1)
    (said,) = (r.getMessage() for r in caplog.records if r.getMessage().startswith("deleted step"))
    assert said.isprintable()


# What find_previous says of objects that stay


def named(*names: str) -> bytes:
    metadata: Any = Metadata({}, None, {})
    metadata.storage_data = {
        MetadataIndex(str(at)): _StorageInfo(name, 0, 1) for at, name in enumerate(names)
    }
    return md.dump(metadata)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["__0_0.distcp"], []),
        (["a/__0_0.distcp", "b/__0_1.distcp"], ["2 objects that lie in other folders"]),
        (["weights.bin", "__0_0.distcp"], ["1 objects that are not data objects"]),
        ([".metadata", "a/notes.txt"], ["2 objects that are not data objects"]),
        (
            ["weights.bin", "a/__0_0.distcp"],
            ["1 objects that lie in other folders", "1 objects that are not data objects"],
        ),
    ],
)
def test_what_is_said_of_objects_that_stay_is_true(
    folder: Place, names: list[str], said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(Target.parse(folder.uri)) as store:
        store.put(md.METADATA_NAME, named(*names), Create())
        found = find_previous(store, md.METADATA_NAME)
    assert found is not None and found.objects == {name for name in names if name == "__0_0.distcp"}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(said)
    for message, words in zip(messages, said, strict=True):
        assert words in message and folder.uri in message and ".metadata" in message


def test_the_base_of_all_errors_escapes_too() -> None:
    assert issubclass(IntegrityError, CheckpointError) and "\n" not in str(CheckpointError("a\nb"))
