"""What is typed: read once, refused with advice, and no secret of it repeated."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
import torch

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.cli.arguments import duration, options_of
from support.commands import at, in_a_pipe, run, save
from support.places import Place
from support.servers import S3Server, unused_port

CANARY = "cAnArY"


def test_options_are_names_and_values_and_storage_options_are_json() -> None:
    given = ["region=eu=1", "part_size=64MiB", 'storage_options={"key": "a=b", "client_kwargs": {}}']
    assert options_of(given) == {
        "region": "eu=1",
        "part_size": "64MiB",
        "storage_options": {"key": "a=b", "client_kwargs": {}},
    }
    assert options_of([]) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0s", timedelta(0)),
        ("90s", timedelta(seconds=90)),
        ("30m", timedelta(minutes=30)),
        ("1.5h", timedelta(minutes=90)),
        ("1D", timedelta(days=1)),
        ("2w", timedelta(weeks=2)),
    ],
)
def test_times_are_read(text: str, expected: timedelta) -> None:
    assert duration(text) == expected


@pytest.mark.parametrize("text", ["", "1", "d", "-1d", "1 d", "1y", "1d2h", "9999999w", "infd", "\u0661d"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a time"):
        duration(text)
    assert run("gc", "memory://x", "--older-than", text, "--yes").status == 2


MISUSES = {
    "no command": [],
    "no such command": ["lss", "/x"],
    "no URI": ["ls"],
    "an empty URI": ["ls", ""],
    "an unknown protocol": ["ls", "s4://bucket/run"],
    "a secret in the URI": ["ls", f"s3://bucket/run?key={CANARY}"],
    "a password in the URI": ["ls", f"s3://me:{CANARY}@bucket/run"],
    "no such option": ["ls", "/x", "--stpe", "1"],
    "an option without a value": ["ls", "/x", "-o", CANARY],
    "an option without a name": ["ls", "/x", "-o", f"={CANARY}"],
    "an unknown option": ["ls", "/x", "-o", f"secrets={CANARY}"],
    "an option of a method": ["ls", "/x", "-o", f"uri={CANARY}"],
    "an option of a class": ["ls", "/x", "-o", f"cls={CANARY}"],
    "an option given twice": ["ls", "gs://x", "-o", f"token={CANARY}", "-o", f"token={CANARY}"],
    "an option that does not apply": ["ls", "/x", "-o", f"token={CANARY}"],
    "a credential as an option": ["ls", "s3://bucket/x", "-o", f"key={CANARY}"],
    "an endpoint with a password": ["ls", "s3://b/x", "-o", f"endpoint_url=http://me:{CANARY}@host"],
    "an option that is not JSON": ["ls", "s3://b/x", "-o", f'storage_options={{"key": {CANARY}}}'],
    "an option that is no object": ["ls", "s3://b/x", "-o", f'storage_options=["{CANARY}"]'],
    "a value that is not allowed": ["ls", "/x", "-o", "concurrency=0"],
    "a step below zero": ["show", "/x", "--step", "-1"],
    "a step beyond the last": ["show", "/x", "--step", str(10**10)],
    "a step that is no number": ["show", "/x", "--step", "newest"],
    "one checkpoint to compare": ["diff", "/x"],
    "nothing to keep": ["prune", "/x", "--yes"],
    "none to keep": ["prune", "/x", "--keep-last", "0", "--yes"],
    "a state of no size": ["doctor", "/x", "--state-size", "large"],
    "a state below zero": ["doctor", "/x", "--state-size", "-1"],
    "no ranks": ["doctor", "/x", "--ranks-per-host", "0"],
    "nothing to move": ["bench", "/x", "--size", "0"],
    "less than no time": ["bench", "/x", "--seconds", "-1"],
    "every zeroth to keep": ["prune", "/x", "--keep-last", "1", "--keep-every", "0", "--yes"],
}


@pytest.mark.parametrize("arguments", MISUSES.values(), ids=MISUSES)
def test_a_misuse_ends_with_2_and_says_nothing_on_the_standard_output(arguments: list[str]) -> None:
    ran = run(*arguments)
    assert ran.status == 2
    if arguments:
        assert ran.out == ""
        assert ran.err
    assert CANARY not in ran.out + ran.err
    assert "Traceback" not in ran.err


def test_a_store_that_is_out_of_reach_is_an_error_of_one_block() -> None:
    secret = json.dumps({"key": f"{CANARY}-key", "secret": CANARY})
    arguments = ["ls", "s3://bucket/run", "-o", f"endpoint_url=http://127.0.0.1:{unused_port()}"]
    arguments += ["-o", "retries=0", "-o", "region=us-east-1", "-o", f"storage_options={secret}"]
    ran = run(*arguments, "--json")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1
    assert "s3://bucket/run" in ran.err
    debugged = run("--debug", *arguments)
    assert debugged.status == 1
    assert "Traceback" in debugged.err and debugged.err.splitlines()[-1] == ran.err.strip()
    assert CANARY not in ran.err + debugged.err + debugged.out


def test_a_bucket_that_is_not_there_and_credentials_that_are_refused(
    rclone: S3Server, moto: S3Server
) -> None:
    gone = Place.on_server(moto, "no-such-bucket").child("run")
    ran = run("ls", gone.uri, place=gone)
    assert (ran.status, ran.out) == (1, "") and "no-such-bucket" in ran.err
    place = Place.on_server(rclone, rclone.new_bucket()).child("run")
    place.options["storage_options"] = {"key": f"{CANARY}-key", "secret": CANARY}
    ran = run("--debug", "ls", place.uri, place=place)
    assert (ran.status, ran.out) == (1, "") and place.uri in ran.err
    assert CANARY not in ran.err


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_options_in_the_query_and_the_environment_reach_the_store(
    moto: S3Server, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place.on_server(moto, moto.new_bucket()).child("run")
    save(place, {"t": torch.ones(3)}, step=1)
    storage = json.dumps(moto.storage_options)
    monkeypatch.setenv("CLOUDCKPT_REGION", "us-east-1")
    uri = f"{place.uri}?endpoint_url={moto.endpoint}"
    ran = run(command, uri, "-o", f"storage_options={storage}", "--json")
    assert (ran.status, ran.err) == (0, "")
    assert ran.json["uri"] in (place.uri, at(place, 1).uri)
    assert moto.secret not in ran.out


def test_a_secret_shows_in_no_output_of_a_process(moto: S3Server) -> None:
    place = Place.on_server(moto, moto.new_bucket()).child("run")
    save(place, {"t": torch.ones(3)}, step=1)
    secret = json.dumps({"key": f"{CANARY}-key", "secret": CANARY, "token": f"{CANARY}-token"})
    reached = ["-o", f"endpoint_url={moto.endpoint}", "-o", "region=us-east-1"]
    ran = in_a_pipe("verify", place.uri, *reached, "-o", f"storage_options={secret}")
    assert ran.status == 0  # moto takes whatever it is given
    assert CANARY not in ran.out + ran.err
