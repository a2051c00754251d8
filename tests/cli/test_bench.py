"""``cloudckpt bench`` moves what it says, takes it away again, and advises by what it measured."""

from __future__ import annotations

import re

import pytest

from cloudckpt.backends.config.options import Options
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.stores.base import PartLimits
from cloudckpt.bench import Measured, Setting, bench, planned
from cloudckpt.bench.advice import advised
from cloudckpt.bench.plan import ROUNDS, plan_for
from support.as_aws import policed
from support.commands import COLUMNS, in_a_pipe, on_a_terminal, options_of, run
from support.places import Place
from support.proxy import proxied
from support.servers import S3Server, moto_server

MIB = 1 << 20
NOW = Setting(32 * MIB, 8)


def took(setting: Setting, *seconds: float) -> Measured:
    return Measured(setting, 256 * MIB, seconds, tuple(one / 2 for one in seconds))


def test_what_is_faster_by_more_than_the_noise_is_advised() -> None:
    advice = advised([took(NOW, 2.0, 2.1, 2.0), took(Setting(16 * MIB, 16), 1.0, 1.1, 1.0)], NOW)
    assert advice.options == "part_size=16MiB&concurrency=16"
    assert "100% faster" in advice.why and "10% of noise" in advice.why


@pytest.mark.parametrize(
    "others",
    [
        [],
        [took(Setting(8 * MIB, 8), 2.2, 2.2, 2.2)],
        [took(Setting(8 * MIB, 8), 1.9, 1.9, 1.9)],
        [took(Setting(8 * MIB, 8), 0.6, 1.5, 2.4)],
        [took(Setting(8 * MIB, 8), 0.1)],
    ],
    ids=["nothing else", "slower", "hardly faster", "faster at times", "measured once"],
)
def test_the_present_options_do_where_nothing_beats_them_for_certain(others: list[Measured]) -> None:
    advice = advised([took(NOW, 2.0, 2.0, 2.0), *others], NOW)
    assert advice.options == "" and "the present options do" in advice.why


def test_of_settings_that_are_as_fast_the_one_with_the_fewest_requests_is_advised() -> None:
    fast = [Setting(8 * MIB, 8), Setting(8 * MIB, 16), Setting(16 * MIB, 32), Setting(16 * MIB, 16)]
    measured = [took(one, 1.0 + n / 100, 1.0 + n / 100) for n, one in enumerate(fast)]
    slow = took(Setting(64 * MIB, 1), 4.0, 4.0)
    assert advised([took(NOW, 2.0, 2.0), slow, *measured], NOW).options == "part_size=16MiB&concurrency=16"
    assert advised([took(NOW, 2.0, 2.0), *measured], NOW, parts=False).options == "concurrency=16"


def test_nothing_is_advised_by_one_round() -> None:
    for measured in ([], [took(NOW, 2.0), took(Setting(8 * MIB, 8), 1.0, 1.0)]):
        assert advised(measured, NOW).options == ""
        assert "too little" in advised(measured, NOW).why


@pytest.mark.parametrize(
    "limits",
    [
        PartLimits(),
        PartLimits(5 * MIB, 5 << 30, in_place=True),
        PartLimits(256 << 10, multiple=256 << 10, in_order=True),
    ],
)
@pytest.mark.parametrize("size", [1, MIB, 100 * MIB + 1, 10 << 30])
def test_a_plan_keeps_to_what_the_store_takes_and_begins_with_the_present(
    size: int, limits: PartLimits
) -> None:
    options = Options.model_validate({"concurrency": 6, "memory_limit": 48 * MIB})
    plan = plan_for(options, limits, size)
    # As in a save of so much, and of whole MiB.
    part_size = min(24, max(8, size // 6 // MIB)) * MIB if limits.in_place else 32 * MIB
    assert plan.up[0] == plan.down[0] == plan.present == Setting(part_size, 6)
    assert len(set(plan.up)) == len(plan.up) <= 9 and len(set(plan.down)) == len(plan.down) <= 6
    for setting in plan.up:
        assert limits.min_size <= setting.part_size <= 48 * MIB
        assert setting.part_size % limits.multiple == 0
        assert 1 <= setting.concurrency <= 64
    assert plan.most_up == size * (2 + ROUNDS * len(plan.up))


def test_a_place_is_measured_and_left_as_it_was(place: Place) -> None:
    ran = run("bench", place.uri, "--size", "6MiB", "--seconds", "1", "--json", place=place)
    assert ran.status == 0
    report = ran.json
    assert report["uri"] == place.uri and report["size"] == 6 * MIB and report["left"] == []
    assert set(report["latencies"]) == {"put", "stat", "get", "delete"}
    assert all(seconds > 0 for seconds in report["latencies"].values())
    for way in ("up", "down"):
        assert report[way][0]["present"] and len(report[way][0]["seconds"]) == ROUNDS
        assert [one["present"] for one in report[way][1:]] == [False] * (len(report[way]) - 1)
        assert all(one["bytes_per_second"] > 0 and one["cpu_seconds_per_gib"] > 0 for one in report[way])
    assert "options" in report["saving"] and report["loading"]["why"]
    assert "moves at most" in ran.err
    assert place.visible() == place.pending() == set()


def test_no_more_is_moved_than_was_said_and_by_the_parts_that_are_named(moto: S3Server) -> None:
    place = Place.on_server(moto, moto.new_bucket()).child("run")
    with proxied(moto.endpoint) as proxy:
        place.options["endpoint_url"] = proxy.endpoint
        said = run("bench", place.uri, "--size", "10MiB", "--seconds", "0", place=place)
        parts = [len(one.body) for one in proxy.seen("UploadPart")]
        completed = len(proxy.seen("CompleteMultipartUpload"))
    # A round to warm up, three of the present options, and one to read from.
    assert (said.status, completed) == (0, 5)
    assert sum(parts) == 50 * MIB and set(parts) == {5 * MIB}
    told = re.search(r"at most ([0-9.]+) MiB up", said.err)
    assert told is not None and float(told[1]) >= 50
    assert "too little" not in said.out and "* the present options" in said.out


@pytest.mark.parametrize("at", [1, 9])
def test_a_measurement_that_is_interrupted_leaves_nothing(place: Place, at: int) -> None:
    target, count = Target.parse(place.uri, **place.options), 0

    def interrupt(_name: str, _nbytes: int) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(target, planned(target, 12 * MIB), seconds=5, observer=interrupt)
    assert place.visible() == place.pending() == set()


def test_what_can_not_be_taken_away_is_named() -> None:
    with moto_server() as server, proxied(server.endpoint) as proxy:
        law, bucket = policed(server, proxy), server.new_bucket()
        with law.denying("s3:DeleteObject") as user:
            place = Place.on_server(user, bucket).child("run")
            ran = run("bench", place.uri, "--size", "6MiB", "--seconds", "0", place=place)
        assert (ran.status, ran.out) == (1, "")
        assert "s3:DeleteObject" in ran.err
        left = Place.on_server(law.root, bucket).child("run").visible()
    assert left and all(name in ran.err for name in left)


def test_a_missing_bucket_and_a_part_size_that_is_refused(moto: S3Server) -> None:
    gone = Place.on_server(moto, "no-such-bucket").child("run")
    ran = run("bench", gone.uri, "--size", "6MiB", place=gone)
    assert (ran.status, ran.out) == (1, "") and "does not exist" in ran.err
    gone.options["part_size"] = MIB
    assert run("bench", gone.uri, place=gone).status == 2


def test_a_terminal_of_80_columns_and_a_pipe(folder: Place) -> None:
    arguments = ["bench", folder.uri, "--size", "4MiB", "--seconds", "0", *options_of(folder)]
    shown, piped = on_a_terminal(*arguments), in_a_pipe(*arguments)
    assert (shown.status, piped.status) == (0, 0)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.out).replace("\r", "\n")
    assert max(map(len, plain.splitlines())) <= COLUMNS
    assert "\x1b" not in piped.out + piped.err
    assert piped.out.startswith(f"{folder.uri}\n") and "saving: " in piped.out and "loading: " in piped.out
