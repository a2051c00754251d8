"""Messages between ranks and errors as data: what is read from the store is never run."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.backends import errors
from cloudckpt.backends.errors import CheckpointError, ExecutorError, IntegrityError
from cloudckpt.executor.coordination import remote_errors, wire_format


@dataclass(frozen=True, slots=True)
class Message:
    """What a test sends."""

    number: int
    text: str
    data: bytes | None = None
    pair: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Other:
    """Another message of the same fields."""

    number: int
    text: str


class OwnError(Exception):
    """An error of a user's own, with a constructor that is not to be called."""

    def __init__(self, what: str, *, made: Path | None = None) -> None:
        super().__init__(what)
        if made is not None:
            made.touch()


class Canary:
    """Leaves a file where it is unpickled."""

    def __init__(self, at: Path) -> None:
        self.at = at

    def __reduce__(self) -> Any:
        return Path.touch, (self.at,)


@given(st.builds(Message, st.integers(), st.text(st.characters(codec="utf-8")), st.just(b"{}")))
def test_a_message_is_read_as_it_was_sent(sent: Message) -> None:
    assert wire_format.message(wire_format.text(sent).encode(), Message, "key") == sent


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_the_key(data: bytes) -> None:
    with pytest.raises(ExecutorError, match="'1/agreement' in the store of the job"):
        wire_format.message(data, Message, "1/agreement")


def test_foreign_values_are_refused(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    honest = wire_format.text(Message(1, "a"))
    foreign = [
        pickle.dumps(Canary(canary)).hex().encode(),
        pickle.dumps(Canary(canary)),
        wire_format.text(Other(1, "a")).encode(),
        honest.replace('"number": 1', '"number": "1"').encode(),
        honest.replace("cloudckpt-1", "cloudckpt-2").encode(),
        honest.encode()[:-1],
        honest.encode() + b" " * wire_format.MOST,
        b"cloudckpt-1 Message " + b"[" * 100_000,
    ]
    for data in foreign:
        assert data != honest.encode()
        with pytest.raises(ExecutorError, match="in the store of the job"):
            wire_format.message(data, Message, "key")
    assert not canary.exists()


ERRORS: list[BaseException] = [
    ValueError("no", 1, None, 2.5, True, b"x", ("a", ["b", {"c": 1}])),
    FileNotFoundError(2, "No such file or directory", "/a"),
    KeyError(("a", 1)),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    OwnError("of a user"),
    IntegrityError("damaged", uri="s3://b/a", object_name="x", rank=3, hint="Load another step"),
    errors.UncertainCommitError("unknown", uri="s3://b/a"),
    CheckpointException("failed", {1: (ValueError("no"), None), 4: (OwnError("x"), None)}),  # type: ignore[dict-item]
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_made_again_from_data(error: BaseException) -> None:
    error.add_note("raised on rank 3")
    again = remote_errors.loads(remote_errors.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.__notes__ == ["raised on rank 3"]
    if isinstance(error, CheckpointError):
        assert vars(again) == vars(error)


def test_the_constructor_of_a_users_error_is_not_called(tmp_path: Path) -> None:
    made = tmp_path / "made"
    record = json.loads(remote_errors.dumps(OwnError("x")))
    record["error"]["args"] = ["x", {"dict": [["made", str(made)]]}]
    assert isinstance(remote_errors.loads(json.dumps(record).encode()), OwnError)
    assert not made.exists()


def test_an_error_that_is_not_plain_data_keeps_its_class_and_text() -> None:
    class Local(Exception):
        pass

    for error, text in [
        (Local("here"), "Local: here"),
        (ValueError(open(__file__)), "ValueError: <_io"),  # noqa: SIM115, PTH123
        (ValueError("x" * 2_000_000), "xxx"),
    ]:
        again = remote_errors.loads(remote_errors.dumps(error))
        assert text in str(again)
        if isinstance(error.args[0], str):
            continue
        error.args[0].close()


@pytest.mark.parametrize(
    "named", ["builtins:SystemExit", "builtins:KeyboardInterrupt", "builtins:eval", "os:system", "nowhere:X"]
)
def test_nothing_but_an_exception_is_made(named: str) -> None:
    record = json.loads(remote_errors.dumps(ValueError("x")))
    record["error"]["class"] = named
    again = remote_errors.loads(json.dumps(record).encode())
    assert type(again) is CheckpointError
    assert "could not be read here" in str(again)


@given(st.binary(max_size=300))
def test_bytes_that_are_no_record_become_an_error_that_says_so(data: bytes) -> None:
    assert "could not be read here" in str(remote_errors.loads(data))
