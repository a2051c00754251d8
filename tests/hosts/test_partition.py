"""Networks that are cut while a job saves: what its ranks report about each save."""

from __future__ import annotations

import json
import queue
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

from support.hosts import inside
from support.partition import Cut, Network, network
from support.sites import Host
from support.trainers import of_rank

SAVE_TIMEOUT = 6.0
START_TIMEOUT = 30.0
PHASES = ("waiting", "planning", "writing", "committing", "committed")
CUTS: dict[str, Cut] = {
    "the ranks from each other": (1, 2),
    "rank 0 from the bucket": (1, 3),
    "rank 1 from the bucket": (2, 3),
    "rank 0 from all": (1,),
    "rank 1 from all": (2,),
    "the bucket from all": (3,),
}
NOT_KNOWN = re.compile("may be committed|is committed")
PATIENCE = START_TIMEOUT + SAVE_TIMEOUT + 60.0


class Rank:
    """A rank of the job on a host."""

    def __init__(self, host: Host, rank: int, master: str, uri: str, environment: dict[str, str]) -> None:
        options = {"save_timeout": SAVE_TIMEOUT, "start_timeout": START_TIMEOUT, "timeout": 2.0}
        self._process = subprocess.Popen(
            host.command(sys.executable, "-m", "support.partition_job", uri, json.dumps(options)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=of_rank(rank, 2, master, 29500, LOCAL_RANK="0", **environment),
        )
        self.told: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"rank-{rank}", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._reader.join()

    def ask(self, *command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(command)}\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Return the next report that is no phase."""
        while "phase" in (told := self.told.get(timeout=PATIENCE)):
            pass
        return told

    def enter(self, phase: str) -> bool:
        """Wait until the save is in a phase; False if it ended before."""
        at = PHASES.index(phase)
        while "phase" in (told := self.told.get(timeout=PATIENCE)):
            if told["phase"] in PHASES and PHASES.index(told["phase"]) >= at:
                return True
        self._put_back(told)
        return False

    def _put_back(self, told: dict[str, Any]) -> None:
        self.told.put(told)  # nothing follows an answer until the next command

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.told.put(json.loads(line))
        self.told.put({"gone": True})


@dataclass
class Tally:
    """The outcomes of the saves of a run."""

    committed: int = 0
    failed: int = 0
    failed_and_there: int = 0
    different: int = 0
    wrong: list[str] = field(default_factory=list)

    def count(self, step: int, what: str, reports: list[dict[str, Any]], looks: list[dict[str, Any]]) -> None:
        """Judge the reports of a save, and what the ranks find after the network has healed."""
        story = f"step {step}, {what}: {reports}, then {looks}"
        if any("done" not in told for told in (*reports, *looks)):
            self.wrong.append(story)
            return
        errors = [report["done"]["error"] for report in reports]
        steps = looks[0]["done"]["steps"]
        there = step in steps
        failed = [error for error in errors if error]
        if looks[0] != looks[1] or not looks[0]["done"]["right"] or looks[0]["done"]["latest"] != max(steps):
            self.wrong.append(f"the ranks do not find the same: {story}")
        if not failed:
            self.committed += 1
            if not there:
                self.wrong.append(f"a success that is not there: {story}")
        elif len(failed) < len(errors) or there:
            self.failed_and_there += there and len(failed) == len(errors)
            self.different += len(failed) < len(errors)
            if not there or not all(NOT_KNOWN.search(text) for _, text in failed):
                self.wrong.append(f"an error does not say that the step may be committed: {story}")
        else:
            self.failed += 1
            if len({name for name, _ in failed}) > 1 and not any(
                NOT_KNOWN.search(text) for _, text in failed
            ):
                self.wrong.append(f"different errors: {story}")


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Network]:
    with ExitStack() as stack:
        try:
            made = stack.enter_context(network(tmp_path))
        except PermissionError as error:
            pytest.skip(str(error))
        yield made


def partitioned(net: Network, cuts: int, seed: int) -> Tally:
    """Cut the network once during each of so many saves, after one that is not disturbed, and judge them."""
    dice = random.Random(seed)
    with inside(net.hosts[0].namespace):
        bucket = net.server.new_bucket()
    tally = Tally()
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                Rank(host, number, net.hosts[0].ipv4, f"s3://{bucket}/run", net.server.environment)
            )
            for number, host in enumerate(net.hosts)
        ]
        for rank in ranks:
            assert "ready" in rank.answer()
        for step in range(cuts + 1):
            for rank in ranks:
                rank.ask("save", step)
            if step:
                what, reports = _cut(net, ranks, dice)
            else:
                what, reports = "not cut", [rank.answer() for rank in ranks]
            for rank in ranks:
                rank.ask("look")
            looks = [rank.answer() for rank in ranks]
            tally.count(step, what, reports, looks)
            sys.stdout.write(f"{step} {what}: {reports} {looks[0]}\n")
    return tally


def _cut(net: Network, ranks: list[Rank], dice: random.Random) -> tuple[str, list[dict[str, Any]]]:
    """Cut the network in a phase of the save that goes on, and heal it; return how, and the reports."""
    what = dice.choice(list(CUTS))
    phase = dice.choice(PHASES)
    later = dice.choice([0.0, 0.0, dice.uniform(0, 0.02), dice.uniform(0, 0.3)])
    # Some end while the save goes on, some after the deadline, and some after every rank has given up.
    lasting = dice.choice([dice.uniform(0.1, 3), dice.uniform(3, 2 * SAVE_TIMEOUT), None])
    ranks[0].enter(phase)
    threading.Event().wait(later)
    net.cut(CUTS[what])
    if lasting is None:
        reports = [rank.answer() for rank in ranks]
        net.heal(CUTS[what])
    else:
        healing = threading.Timer(lasting, net.heal, [CUTS[what]])
        healing.start()
        reports = [rank.answer() for rank in ranks]
        healing.join()
    return f"{what} while {phase} +{later:.3f} s for {lasting} s", reports


def test_ranks_report_the_same_of_saves_whose_network_is_cut(net: Network) -> None:
    tally = partitioned(net, 3, 28)
    assert not tally.wrong, "\n".join(tally.wrong)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(4))
def test_ranks_report_the_same_of_fifty_saves_whose_network_is_cut(net: Network, seed: int) -> None:
    tally = partitioned(net, 50, seed)
    assert not tally.wrong, "\n".join(tally.wrong)
    assert tally.committed and tally.failed
