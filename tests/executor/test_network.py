"""A host that is cut off in the middle of a save: PROMISES 4, on two hosts with a cable between them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from support import saboteurs
from support.executors import assert_loads, small_state, until, within
from support.hosts import Host, two_hosts
from support.trainers import TrainerProcess

SAVE_TIMEOUT = 10.0


def test_a_peer_that_is_cut_off_fails_the_save_at_the_deadline_on_both_sides(tmp_path: Path) -> None:
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(two_hosts())
        except PermissionError as error:
            pytest.skip(str(error))

        def trainer(rank: int, host: Host) -> TrainerProcess:
            return stack.enter_context(
                TrainerProcess(
                    tmp_path,
                    *host.prefix,
                    rank=rank,
                    world_size=2,
                    init_method=f"tcp://{hosts[0].address}:29500",
                    executor={"save_timeout": SAVE_TIMEOUT, "start_timeout": 60.0},
                    environment={"GLOO_SOCKET_IFNAME": host.interface},
                )
            )

        trainers = [trainer(rank, host) for rank, host in enumerate(hosts)]
        for one in trainers:
            one.started()
        save_on_both(trainers, 1)

        for one in trainers:
            one.ask("begin", 2, saboteurs.WRITE_DATA, saboteurs.WAIT, 1)
        until((tmp_path / "reached").exists)
        hosts[1].link("down")
        (tmp_path / "go").touch()
        with within(SAVE_TIMEOUT + 40):
            for one in trainers:
                one.tell("result")
            outcomes = [one.answer() for one in trainers]
        for outcome in outcomes:
            assert outcome["error"] == "SaveTimeoutError"
            assert "cut off" in outcome["said"]
        assert not (tmp_path / "step-2" / ".metadata").exists()

        hosts[1].link("up")
        for step in (3, 4):
            save_on_both(trainers, step)
            assert_loads(f"file://{tmp_path}/step-{step}", small_state(step, 1))
        for one in trainers:
            one.tell("close")
        for one in trainers:
            one.answer()


def save_on_both(trainers: list[TrainerProcess], step: int) -> None:
    for one in trainers:
        one.tell("save", step)
    assert [one.answer() for one in trainers] == [{"error": None}] * 2
