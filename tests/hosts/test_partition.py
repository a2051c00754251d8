"""Networks that are cut while a job saves: what its ranks report about each save."""

from __future__ import annotations

import random
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support.commanded import PHASES, Rank
from support.hosts import inside
from support.partition import Cut, Network, network

SAVE_TIMEOUT = 6.0
CUTS: dict[str, Cut] = {
    "the ranks from each other": (1, 2),
    "rank 0 from the bucket": (1, 3),
    "rank 1 from the bucket": (2, 3),
    "rank 0 from all": (1,),
    "rank 1 from all": (2,),
    "the bucket from all": (3,),
}
NOT_KNOWN = re.compile("may be committed|is committed")
OPTIONS = {"save_timeout": SAVE_TIMEOUT, "start_timeout": 30.0, "timeout": 2.0}
MASTER_PORT = 29500


@dataclass
class UploadChecksums:
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


def partitioned(net: Network, cuts: int, seed: int) -> UploadChecksums:
    """Cut the network once during each of so many saves, after one that is not disturbed, and judge them."""
    dice = random.Random(seed)
    with inside(net.hosts[0].namespace):
        bucket = net.server.new_bucket()
    tally = UploadChecksums()
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                Rank(
                    number,
                    (net.hosts[0].ipv4, MASTER_PORT),
                    f"s3://{bucket}/run",
                    OPTIONS,
                    host=host,
                    environment=net.server.environment,
                )
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
