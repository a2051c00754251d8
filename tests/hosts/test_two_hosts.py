"""Saves on hosts and networks as they are: PROMISES 5, in network and UTS namespaces."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support.sites import Host, run, site
from support.trainers import of_rank

START_TIMEOUT = 60.0
MASTER_PORT = 29500
SLOW = ("netem", "delay", "15ms", "5ms", "loss", "1%")


@dataclass
class Job:
    """A job with ranks on several hosts.

    Attributes:
        master: ``MASTER_ADDR``, on each host.
        options: of the Checkpointer, on each host.
        environment: of each host.
        ranks: on each host.
        connected: called once training's ranks are connected, and before they save.
    """

    folder: Path
    hosts: list[Host]
    master: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    environment: list[dict[str, str]] | None = None
    ranks: int = 1
    start_timeout: float = START_TIMEOUT
    connected: Callable[[], None] | None = None

    def run(self) -> list[dict[str, Any]]:
        """Return what each rank tells of its run."""
        world = len(self.hosts) * self.ranks
        with ExitStack() as stack:
            started = [
                stack.enter_context(self._rank(number, host, local * len(self.hosts) + number, world))
                for local in range(self.ranks)
                for number, host in enumerate(self.hosts)
            ]
            try:
                if self.connected is not None:
                    assert started[0].stdout is not None and started[0].stdin is not None
                    assert started[0].stdout.readline() == "connected\n"
                    self.connected()
                    started[0].stdin.write("go\n")
                    started[0].stdin.flush()
                outputs = [one.communicate(timeout=240) for one in started]
            finally:
                for one in started:
                    one.kill()
        for one, (out, errors) in zip(started, outputs, strict=True):
            assert one.returncode == 0, f"{out}\n{errors}"
        return sorted((json.loads(out.splitlines()[-1]) for out, _ in outputs), key=lambda one: one["rank"])

    def _rank(self, number: int, host: Host, rank: int, world: int) -> subprocess.Popen[str]:
        environment = of_rank(
            rank,
            world,
            self.master[number],
            MASTER_PORT,
            LOCAL_RANK=str(rank // len(self.hosts)),
            **({} if self.connected is None else {"CLOSE": "1"}),
        )
        environment.pop("GLOO_SOCKET_IFNAME", None)
        return subprocess.Popen(
            host.command(
                *(sys.executable, "-m", "support.host_job", f"file://{self.folder}/run"),
                *(json.dumps(self.options), str(self.start_timeout)),
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | ({} if self.environment is None else self.environment[number]),
        )


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[..., list[Host]]]:
    with ExitStack() as stack:

        def make(**options: Any) -> list[Host]:
            try:
                return stack.enter_context(site(tmp_path, **options))
            except PermissionError as error:
                pytest.skip(str(error))

        yield make


def assert_works(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        assert outcome["errors"] == [], outcome
        assert outcome["loaded"] == 2 and outcome["right"], outcome
        assert outcome["trained"] > 0


def assert_uses(outcomes: list[dict[str, Any]], *addresses: str) -> None:
    for outcome, address in zip(outcomes, addresses, strict=True):
        assert any(f"uses {address} " in line for line in outcome["said"]), outcome["said"]


def debian(*hosts: Host) -> None:
    """Write ``/etc/hosts`` as Debian's installer does, and the other hosts' names."""
    for host in hosts:
        host.knows(
            f"127.0.1.1 {host.name}", *(f"{other.ipv4} {other.name}" for other in hosts if other != host)
        )


def test_own_name_at_127_0_1_1(hosts: Callable[..., list[Host]], tmp_path: Path) -> None:
    first, second = hosts()
    debian(first, second)
    outcomes = Job(tmp_path, [first, second], master=[first.ipv4] * 2).run()
    assert_works(outcomes)
    assert_uses(outcomes, first.ipv4, second.ipv4)
    assert "reaches the store at" in str(outcomes[1]["said"])


def test_master_addr_by_a_name_that_its_own_host_has_at_127_0_1_1(
    hosts: Callable[..., list[Host]], tmp_path: Path
) -> None:
    first, second = hosts()
    debian(first, second)
    outcomes = Job(tmp_path, [first, second], master=[first.name] * 2).run()
    assert_works(outcomes)
    assert_uses(outcomes, first.ipv4, second.ipv4)
    assert "the ranks of other hosts reach the store there" in str(outcomes[0]["said"])


def test_own_name_that_resolves_to_nothing(hosts: Callable[..., list[Host]], tmp_path: Path) -> None:
    first, second = hosts()
    assert_works(Job(tmp_path, [first, second], master=[first.ipv4] * 2).run())


@pytest.mark.parametrize("by_name", [False, True])
def test_own_name_at_an_address_of_docker0_that_both_hosts_have(
    hosts: Callable[..., list[Host]], tmp_path: Path, *, by_name: bool
) -> None:
    first, second = hosts()
    for host in (first, second):
        host.ip("link", "add", "docker0", "type", "bridge")
        host.ip("addr", "add", "172.17.0.1/16", "dev", "docker0")
        host.ip("link", "set", "docker0", "up")
    first.knows(f"172.17.0.1 {first.name}")
    second.knows(f"172.17.0.1 {second.name}", f"{first.ipv4} {first.name}")
    outcomes = Job(tmp_path, [first, second], master=[first.name if by_name else first.ipv4] * 2).run()
    assert_works(outcomes)
    assert_uses(outcomes, first.ipv4, second.ipv4)


def test_two_networks_of_which_the_one_of_the_names_is_dead(
    hosts: Callable[..., list[Host]], tmp_path: Path
) -> None:
    first, second = hosts(second=True)
    for host in (first, second):
        host.knows(*(f"{one.second} {one.name}" for one in (first, second)))
    second.ip("link", "set", "eth1", "down")
    outcomes = Job(tmp_path, [first, second], master=[first.ipv4] * 2).run()
    assert_works(outcomes)
    assert_uses(outcomes, first.ipv4, second.ipv4)


@pytest.mark.parametrize("named", [False, True])
def test_ipv6_alone(hosts: Callable[..., list[Host]], tmp_path: Path, *, named: bool) -> None:
    first, second = hosts(ipv4=False)
    for host in (first, second):
        host.knows(*([f"127.0.1.1 {host.name}"] if named else []))
    outcomes = Job(tmp_path, [first, second], master=[first.ipv6] * 2).run()
    assert_works(outcomes)
    assert_uses(outcomes, first.ipv6, second.ipv6)


def test_a_name_of_both_families_that_hosts_resolve_differently(
    hosts: Callable[..., list[Host]], tmp_path: Path
) -> None:
    first, second, third = hosts(count=3)
    first.knows(f"127.0.1.1 {first.name}")
    second.knows(f"{first.ipv6} {first.name}", f"{first.ipv4} {first.name}")
    third.knows(f"{first.ipv4} {first.name}")
    outcomes = Job(tmp_path, [first, second, third], master=[first.name] * 3).run()
    assert_works(outcomes)


@pytest.mark.parametrize("how", ["blackhole", "prohibit"])
def test_a_firewall_that_lets_only_the_master_port_through(
    hosts: Callable[..., list[Host]], tmp_path: Path, how: Any
) -> None:
    first, second = hosts()
    for host in (first, second):
        host.close_ports(how, str(MASTER_PORT))
    outcomes = Job(tmp_path, [first, second], master=[first.ipv4] * 2).run()
    assert_works(outcomes)
    (warning,) = [line for line in outcomes[0]["said"] if line.startswith("WARNING")]
    assert f"host hostb ({second.ipv4}) can't reach host hosta at {first.ipv4}:" in warning
    assert "ports that the system chooses" in warning and "port_range=" in warning
    assert not [line for line in outcomes[1]["said"] if line.startswith("WARNING")]


def test_a_firewall_that_lets_a_range_of_ports_through(
    hosts: Callable[..., list[Host]], tmp_path: Path
) -> None:
    first, second = hosts()
    debian(first, second)
    for host in (first, second):
        host.close_ports("blackhole", str(MASTER_PORT), "29600-29609")
    job = Job(tmp_path, [first, second], master=[first.ipv4] * 2, options={"port_range": "29600-29609"})
    outcomes = job.run()
    assert_works(outcomes)
    assert f"a store that the first rank has opened at {first.ipv4}:2960" in str(outcomes[1]["said"])
    assert not [line for outcome in outcomes for line in outcome["said"] if line.startswith("WARNING")]


def test_a_firewall_before_a_store_of_the_jobs_own_is_named_on_both_sides(
    hosts: Callable[..., list[Host]], tmp_path: Path
) -> None:
    first, second = hosts()
    for host in (first, second):
        host.close_ports("blackhole", str(MASTER_PORT))
    job = Job(
        tmp_path,
        [first, second],
        master=[first.ipv4] * 2,
        environment=[{"DCP_USE_PREFIX_STORE": "0"}] * 2,
        start_timeout=15,
    )
    for outcome in job.run():
        errors = {text for what, _, text in outcome["errors"] if what in {"async_save", "result", "save"}}
        assert errors
        for text in errors:
            assert "rank 1 can't reach the store that rank 0 has opened" in text and first.ipv4 in text
        assert max(outcome["took"].values()) < 15 + 20


def test_a_store_port_that_is_closed_while_the_job_runs_is_named_on_both_sides(
    hosts: Callable[..., list[Host]], tmp_path: Path
) -> None:
    if shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin") is None:
        pytest.skip("nft, which closes a port for new connections, is not installed")
    first, second = hosts()
    job = Job(
        tmp_path,
        [first, second],
        master=[first.ipv4] * 2,
        start_timeout=20,
        connected=lambda: first.close_port_for_new_connections(MASTER_PORT),
    )
    for outcome in job.run():
        saves = {
            what: text for what, _, text in outcome["errors"] if what in {"async_save", "result", "save"}
        }
        assert saves
        for text in saves.values():
            assert f"rank 1 on host hostb can't open a connection to the store at {first.ipv4}:29500" in text
            assert "raise start_timeout" not in text


WAYS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "keyword": ({"interface": "eth1"}, {}),
    "network": ({}, {"CLOUDCKPT_INTERFACE": "10.78.0.0/16"}),
    "gloo's variable": ({}, {"GLOO_SOCKET_IFNAME": "eth1"}),
    "before gloo's variable": ({}, {"CLOUDCKPT_INTERFACE": "eth1", "GLOO_SOCKET_IFNAME": "eth0"}),
}


@pytest.mark.parametrize(
    "way", [way if way == "network" else pytest.param(way, marks=pytest.mark.soak) for way in WAYS]
)
def test_an_interface_of_our_choice(hosts: Callable[..., list[Host]], tmp_path: Path, way: str) -> None:
    first, second = hosts(second=True)
    debian(first, second)
    options, environment = WAYS[way]
    outcomes = Job(tmp_path, [first, second], [first.ipv4] * 2, options, [environment] * 2).run()
    assert_works(outcomes)
    assert_uses(outcomes, first.second, second.second)


def test_an_interface_that_is_not_there_is_refused_with_those_that_are(
    hosts: Callable[..., list[Host]], tmp_path: Path
) -> None:
    first, second = hosts()
    outcomes = Job(tmp_path, [first, second], [first.ipv4] * 2, options={"interface": "ib0"}).run()
    for outcome, host in zip(outcomes, (first, second), strict=True):
        ((what, kind, text),) = outcome["errors"]
        assert (what, kind) == ("make", "ConfigurationError")
        assert "interface=ib0" in text and f"eth0 ({host.ipv4}, {host.ipv6})" in text


def test_a_store_of_the_jobs_own_where_names_lead_to_127_0_1_1(
    hosts: Callable[..., list[Host]], tmp_path: Path
) -> None:
    first, second = hosts()
    debian(first, second)
    environment = [{"DCP_USE_PREFIX_STORE": "0"}] * 2
    outcomes = Job(tmp_path, [first, second], [first.name] * 2, environment=environment).run()
    assert_works(outcomes)
    assert_uses(outcomes, first.ipv4, second.ipv4)


def test_three_hosts_with_two_ranks_each(hosts: Callable[..., list[Host]], tmp_path: Path) -> None:
    three = hosts(count=3)
    debian(*three)
    outcomes = Job(tmp_path, three, master=[three[0].name] * 3, ranks=2, start_timeout=120).run()
    assert_works(outcomes)
    assert_uses(outcomes, *(host.ipv4 for _ in range(2) for host in three))


def test_doctor_names_the_firewall_and_the_address(hosts: Callable[..., list[Host]], tmp_path: Path) -> None:
    first, second = hosts()
    debian(first, second)
    for host in (first, second):
        host.close_ports("prohibit", str(MASTER_PORT))
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    host.command(
                        *(sys.executable, "-m", "cloudckpt.cli", "doctor", str(tmp_path), "--json"),
                        *("--rendezvous", f"{first.name}:{MASTER_PORT}"),
                        *("--rank", str(rank), "--world-size", "2"),
                    ),
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for rank, host in enumerate((first, second))
        ]
        outputs = [json.loads(one.communicate(timeout=150)[0]) for one in started]
    for output, host in zip(outputs, (first, second), strict=True):
        checks = {finding["check"]: finding for finding in output["findings"]}
        assert "127.0.1.1" in checks["own name"]["what"]
        assert checks["ranks"]["state"] == "warning"
        assert f"uses {host.ipv4} (eth0)" in checks["ranks"]["what"]
        assert f"can't reach host hosta at {first.ipv4}" in checks["ranks"]["advice"]
        assert "port_range=" in checks["ranks"]["advice"]


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_saves_over_a_slow_network_that_is_cut_now_and_then(
    hosts: Callable[..., list[Host]], tmp_path: Path
) -> None:
    first, second = hosts()
    debian(first, second)
    for host in (first, second):
        with suppress(subprocess.CalledProcessError):  # a kernel without netem: the cuts alone
            run("ip", "netns", "exec", host.namespace, "tc", "qdisc", "add", "dev", "eth0", "root", *SLOW)
    over = threading.Event()

    def cut() -> None:
        dice = random.Random(24)
        while not over.wait(dice.uniform(2, 8)):
            second.ip("link", "set", "eth0", "down")
            over.wait(dice.uniform(0.5, 6))
            second.ip("link", "set", "eth0", "up")

    cutter = threading.Thread(target=cut, name="cutter")
    environment = [{"STEPS": "200", "SAVE_TIMEOUT": "20"}] * 2
    job = Job(tmp_path, [first, second], [first.name] * 2, environment=environment, connected=cutter.start)
    try:
        one, other = job.run()
    finally:
        over.set()
        cutter.join()
    failed = {what.removeprefix("step ") for what, _, _ in one["errors"]}
    assert failed == {what.removeprefix("step ") for what, _, _ in other["errors"]}
    assert one["steps"] == other["steps"] and one["last"] == other["last"] == one["steps"][-1]
    assert one["weights"] == other["weights"] == float(one["last"])
    assert len(one["steps"]) + len(failed) >= 202, "a save that reported no error is committed"
    for what, kind, text in one["errors"]:
        assert kind in {"ExecutorError", "SaveTimeoutError", "ExecutorDiedError"}, (what, kind, text)
