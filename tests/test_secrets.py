"""Secrets reach the store, and neither eyes nor files: no text, error, log or pickle shows one in clear."""

from __future__ import annotations

import copy
import io
import logging
import os
import pickle
import pprint
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import cloudckpt
from cloudckpt.backends import errors
from cloudckpt.backends.config.options import Options
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import AccessDeniedError, CheckpointError, ConfigurationError
from cloudckpt.backends.stores import open_store
from cloudckpt.executor import ProcessExecutor
from support.places import Place
from support.servers import S3Server, unused_port

pytestmark = pytest.mark.timeout(120)

CANARY = "cAnArY"
"""Is in every secret here, and nowhere else."""


@dataclass
class Credentials:
    """Something of the user's own in ``storage_options``."""

    secret: str = CANARY


S3_OPTIONS: dict[str, Any] = {
    "key": f"{CANARY}-key",
    "secret": f"{CANARY}-secret",
    "token": f"{CANARY}-token",
    "client_kwargs": {"verify": f"/{CANARY}", "region_name": "us-east-1"},
    "config_kwargs": {"user_agent_extra": f"{CANARY}-header", "proxies": {"http": f"http://me:{CANARY}@p:1"}},
}
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "S3": ("s3://bucket/run", {"storage_options": S3_OPTIONS}),
    "a token for GCS": ("gs://bucket/run", {"token": f"{CANARY}-token"}),
    "options for GCS": ("gs://bucket/run", {"storage_options": {"token": {"private_key": CANARY}}}),
    "a password": ("ftp://host/run", {"storage_options": {"username": CANARY, "password": CANARY}}),
    "an object": ("ftp://host/run", {"storage_options": {"session": [Credentials()], CANARY: b"cAnArY"}}),
}


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    uri, options = TARGETS[request.param]
    return Target.parse(uri, **options)


def holders(target: Target) -> list[Any]:
    """Everything that is made of a target and its options."""
    uri, options = target.uri, target.layers.keywords
    return [
        *(target, target.options, target.layers, target.child("x"), target.moved_to(f"{uri}/y")),
        *(
            open_store(target),
            cloudckpt.StorageWriter(uri, **options),
            cloudckpt.StorageReader(uri, **options),
        ),
    ]


def assert_hidden(*texts: str | bytes) -> None:
    for text in texts:
        assert CANARY not in (text if isinstance(text, str) else text.decode("latin-1"))


def assert_error_hides(error: BaseException) -> None:
    """Neither its words, fields, notes and causes with their tracebacks, nor its pickle."""
    assert_hidden(str(error), repr(error), repr(vars(error)), *getattr(error, "__notes__", ()))
    assert_hidden("".join(traceback.format_exception(error)), pickle.dumps(error))


def test_no_text_of_what_holds_a_secret_shows_it(target: Target) -> None:
    for one in holders(target):
        assert_hidden(repr(one), str(one), f"{one}", ascii(one), pprint.pformat({"x": [one]}))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickle_of_what_holds_a_secret_shows_it(target: Target, protocol: int) -> None:
    for one in holders(target):
        assert_hidden(pickle.dumps(one, protocol), pickle.dumps([(one, {"x": one})], protocol))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_brings_the_secret_to_another_process(target: Target, protocol: int) -> None:
    arrived = pickle.loads(pickle.dumps(target, protocol))
    assert arrived == target
    assert arrived.layers == target.layers
    assert arrived.moved_to(target.uri).options == target.options
    for one in (copy.copy(target), copy.deepcopy(target)):
        assert one == target and one.layers == target.layers


def test_no_two_pickles_of_a_secret_are_masked_alike(target: Target) -> None:
    assert pickle.dumps(target) != pickle.dumps(target)


def test_classes_in_a_sealed_pickle_are_found_by_the_unpickler_around_it() -> None:
    found: list[str] = []

    class Finder(pickle.Unpickler):
        def find_class(self, module_name: str, global_name: str, /) -> Any:
            found.append(global_name)
            return super().find_class(module_name, global_name)

    target = Target.parse("ftp://host/run", storage_options={"session": Credentials("mine")})
    arrived = Finder(io.BytesIO(pickle.dumps(target))).load()
    assert arrived.options.storage_options == {"session": Credentials("mine")}
    assert "Credentials" in found


def test_a_secret_in_the_environment_is_hidden_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDCKPT_TOKEN", CANARY)
    target = Target.parse("gs://bucket/run")
    for one in holders(target):
        assert_hidden(repr(one), pickle.dumps(one))
    assert pickle.loads(pickle.dumps(target)).options.token.get_secret_value() == CANARY


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        ("gs://bucket/x", {"token": [CANARY]}),
        ("gs://bucket/x", {"tokens": CANARY}),
        ("s3://bucket/x", {"secret": CANARY}),
        ("s3://bucket/x", {"storage_options": CANARY}),
        ("s3://bucket/x", {"storage_options": {"key": CANARY}, "part_size": "much"}),
        ("memory://x", {"storage_options": {"key": CANARY}}),
        ("file:///x", {"token": CANARY}),
        ("s3://bucket/x", {"endpoint_url": f"http://me:{CANARY}@host"}),
        ("s3://bucket/x", {"endpoint_url": f"http://{CANARY}@host"}),
        ("s3://bucket/x", {"endpoint_url": f"https://host/x?X-Amz-Signature={CANARY}"}),
        ("s3://bucket/x", {"storage_options": {"endpoint_url": f"http://me:{CANARY}@host"}}),
        (
            "s3://bucket/x",
            {"storage_options": {"client_kwargs": {"endpoint_url": f"http://h/?sig={CANARY}"}}},
        ),
        (f"s3://bucket/x?endpoint_url=http://me:{CANARY}@host", {}),
        (f"s3://bucket/x?endpoint_url=http%3A%2F%2Fme%3A{CANARY}%40host", {}),
        (f"s3://bucket/x?X-Amz-Credential={CANARY}", {}),
        (f"s3://bucket/x?X-Amz-Security-Token={CANARY}&X-Amz-Signature={CANARY}", {}),
        (f"https://bucket.s3.amazonaws.com/x?AWSAccessKeyId={CANARY}&Signature={CANARY}", {}),
        (f"s3://me:{CANARY}@bucket/x", {}),
        (f"ftp://me:{CANARY}@host/x", {}),
    ],
)
def test_a_secret_that_is_refused_is_not_repeated(uri: str, options: dict[str, Any]) -> None:
    for call in (Target.parse, cloudckpt.StorageWriter, cloudckpt.StorageReader):
        with pytest.raises(ConfigurationError) as caught:
            call(uri, **options)
        error = caught.value
        assert_hidden(str(error), repr(error), repr(vars(error)), pickle.dumps(error))
        assert error.__cause__ is None
        assert error.__suppress_context__ or error.__context__ is None


def test_options_checked_by_themselves_do_not_repeat_what_they_refuse() -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        Options.model_validate({"token": [CANARY], "storage_options": CANARY})
    assert_hidden(str(caught.value), repr(caught.value))


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(errors).values() if isinstance(kind, type)], ids=lambda kind: kind.__name__
)
def test_an_error_says_what_it_was_given_and_nothing_of_its_target(kind: type[Any], target: Target) -> None:
    if not issubclass(kind, CheckpointError):
        return
    assert_error_hides(kind("it failed", uri=target.uri, rank=1).located(object_name="x"))


# --- what really fails


def save(place: Place, **options: Any) -> None:
    dcp.save({"x": torch.ones(3)}, storage_writer=place.writer(**options))


def load(place: Place, **options: Any) -> None:
    dcp.load({"x": torch.ones(3)}, storage_reader=place.reader(**options))


def failure_of(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(CheckpointException) as caught:
        call()
    ((failure, _),) = caught.value.failures.values()
    assert_hidden(str(caught.value), "".join(traceback.format_exception(caught.value)))
    return failure


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Everything that this library has logged."""
    caplog.set_level(logging.DEBUG, logger="cloudckpt")

    def text() -> str:
        ours = [record for record in caplog.records if record.name.startswith("cloudckpt")]
        return "\n".join(logging.Formatter("%(message)s %(args)r").format(record) for record in ours)

    return text


@pytest.fixture(params=[save, load], ids=["save", "load"])
def attempt(request: pytest.FixtureRequest) -> Callable[..., None]:
    chosen: Callable[..., None] = request.param
    return chosen


WRONG = {"key": f"{CANARY}-key", "secret": f"{CANARY}-secret"}


def test_credentials_that_a_server_refuses(
    attempt: Callable[..., None], rclone: S3Server, log: Callable[[], str]
) -> None:
    place = Place.on_server(rclone, rclone.new_bucket()).child("run")
    failure = failure_of(lambda: attempt(place, storage_options=WRONG))
    assert isinstance(failure, AccessDeniedError)
    assert_error_hides(failure)
    assert_hidden(log())


UNREACHABLE: dict[str, Callable[[int], dict[str, Any]]] = {
    "nobody listens": lambda port: {"endpoint_url": f"http://127.0.0.1:{port}"},
    "a proxy": lambda port: {"config_kwargs": {"proxies": {"http": f"http://me:{CANARY}@127.0.0.1:{port}"}}},
    "a certificate": lambda port: {
        "client_kwargs": {"verify": f"/{CANARY}"},
        "endpoint_url": f"https://127.0.0.1:{port}",
    },
    "an unknown option": lambda _: {"no_such_option": CANARY},
    "an unknown option of the client": lambda _: {"client_kwargs": {"no_such_option": CANARY}},
    "an unknown setting": lambda _: {"config_kwargs": {"no_such_option": CANARY}},
}


@pytest.mark.parametrize("given", UNREACHABLE.values(), ids=UNREACHABLE)
def test_a_server_that_can_not_be_reached(
    attempt: Callable[..., None],
    moto: S3Server,
    log: Callable[[], str],
    given: Callable[[int], dict[str, Any]],
) -> None:
    options = {**WRONG, **given(unused_port())}
    endpoint = options.pop("endpoint_url", moto.endpoint)
    place = Place("unreachable", "s3://bucket/run", moto, {"region": "us-east-1", "retries": 0})
    failure = failure_of(lambda: attempt(place, endpoint_url=endpoint, storage_options=options))
    assert_error_hides(failure)
    assert_hidden(log())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of FTPFileSystem.__del__
def test_another_file_system_that_can_not_be_reached(
    attempt: Callable[..., None], log: Callable[[], str]
) -> None:
    place = Place("ftp", "ftp://127.0.0.1/run")
    given = {"port": unused_port(), "username": CANARY, "password": CANARY}
    failure = failure_of(lambda: attempt(place, storage_options=given))
    assert_error_hides(failure)
    assert_hidden(log())


def test_a_save_in_the_background_keeps_its_secret_on_the_way_and_when_it_fails(
    rclone: S3Server,
    log: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    sent: list[bytes] = []
    send_bytes = Connection.send_bytes

    def recorded(self: Connection, buffer: Any, *args: Any) -> None:
        sent.append(bytes(buffer))
        send_bytes(self, buffer, *args)

    monkeypatch.setattr(Connection, "send_bytes", recorded)
    right = Place.on_server(rclone, rclone.new_bucket()).child("run")
    with ProcessExecutor(save_timeout=60, start_timeout=60) as executor:
        handle = executor.execute_save(
            {"x": torch.ones(3)}, storage_writer=right.writer(storage_options=WRONG), no_dist=True
        )
        failure = handle.exception()
        command = Path(f"/proc/{executor.pid}/cmdline").read_bytes()
        executor.execute_save({"x": torch.ones(3)}, storage_writer=right.writer(), no_dist=True).result()
    assert isinstance(failure, AccessDeniedError)
    assert_error_hides(failure)
    assert_hidden(command, log(), *sent, *capfd.readouterr())
    assert max(map(len, sent)) > 500
    assert not any(rclone.secret.encode() in message for message in sent)
    assert os.getpid() != executor.pid
