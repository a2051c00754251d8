"""``cloudckpt doctor`` on the ranks of a job: they meet, reach each other, and say by which address."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cloudckpt.doctor.network import Rendezvous, ranks
from cloudckpt.executor.network.network_options import NetworkOptions

DOCTOR = (sys.executable, "-m", "cloudckpt.cli", "doctor")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def findings(command: list[str], ranks: int, **variables: str) -> list[dict[str, dict[str, Any]]]:
    """Run the command once a rank, with ``{rank}`` in it and in the variables; findings by their check."""
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [part.format(rank=rank) for part in command],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=os.environ | {name: value.format(rank=rank) for name, value in variables.items()},
                )
            )
            for rank in range(ranks)
        ]
        found = []
        for one in started:
            out, errors = one.communicate(timeout=150)
            assert one.returncode == 0, f"{out}\n{errors}"
            found.append({finding["check"]: finding for finding in json.loads(out)["findings"]})
    return found


@pytest.mark.parametrize("launched", [False, True])
def test_ranks_meet_and_tell_their_addresses(tmp_path: Path, *, launched: bool) -> None:
    port = str(free_port())
    command = [*DOCTOR, str(tmp_path), "--json"]
    variables = {}
    if launched:
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "{rank}", "WORLD_SIZE": "2"}
    else:
        command += ["--rendezvous", f"127.0.0.1:{port}", "--rank", "{rank}", "--world-size", "2"]
    found = findings(command, 2, **variables)
    for rank, checks in enumerate(found):
        assert checks["rendezvous"]["state"] == checks["ranks"]["state"] == "ok"
        assert f"rank {rank} on host" in checks["ranks"]["what"] and "127.0.0.1" in checks["ranks"]["what"]
    assert "put" in found[0] and "put" not in found[1], "one rank alone tries the place"


def test_ranks_of_one_port_meet_in_a_store_of_that_port(tmp_path: Path) -> None:
    ports = f"{free_port()}"
    command = [*DOCTOR, str(tmp_path), "--json", "--rendezvous", f"127.0.0.1:{free_port()}"]
    command += ["--rank", "{rank}", "--world-size", "2", "--port-range", ports]
    for checks in findings(command, 2):
        assert f"127.0.0.1:{ports}" in checks["ranks"]["what"]


def test_without_a_rendezvous_doctor_says_that_the_network_was_not_tried(tmp_path: Path) -> None:
    (checks,) = findings([*DOCTOR, str(tmp_path), "--json"], 1)
    assert checks["ranks"]["state"] == "skipped" and "--rendezvous" in checks["ranks"]["what"]
    assert socket.gethostname() in checks["own name"]["what"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--rank", "0"],
        ["--rendezvous", "hosta:29500", "--rank", "2", "--world-size", "2"],
        ["--rendezvous", "hosta", "--rank", "0", "--world-size", "2"],
        ["--rendezvous", "hosta:x", "--rank", "0", "--world-size", "2"],
        ["--interface", "nosuch0"],
        ["--port-range", "5-3"],
        ["--port-range", "0-70000"],
    ],
)
def test_wrong_usage_ends_with_status_2_and_the_cure(tmp_path: Path, wrong: list[str]) -> None:
    done = subprocess.run([*DOCTOR, str(tmp_path), *wrong], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Give" in done.stderr or "Run" in done.stderr


def test_a_rendezvous_whose_name_resolves_to_nothing_is_told_so() -> None:
    place = Rendezvous("nobody.invalid", 29400, rank=1, world_size=2)
    (finding,) = ranks(place, NetworkOptions.given(), timeout=1)
    assert finding.check == "rendezvous" and finding.state == "failed"
    assert "nobody.invalid resolves to no address on host" in finding.what
    assert "/etc/hosts" in finding.advice
