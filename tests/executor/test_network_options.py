"""The options ``interface`` and ``port_range``, and the private names of torch that give gloo an address."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from contextlib import closing
from typing import Any

import pytest
from torch.distributed import ProcessGroupGloo, distributed_c10d

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.executor.network.network_options import NetworkOptions


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLOUDCKPT_INTERFACE", "CLOUDCKPT_PORT_RANGE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def one_free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


NOT_HERE = ["", " ", True, 5, b"lo", "ib0", "lo,eth0", "fe80::1%lo", "203.0.113.0/24", "10.0.0.1/33"]
NOBODYS = ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255", "127.255.255.255"]  # noqa: S104


@pytest.mark.parametrize("interface", NOT_HERE + NOBODYS)
def test_an_interface_that_no_rank_can_use_is_refused_with_those_that_are_here(interface: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"lo \(127\.0\.0\.1"):
        NetworkOptions.given(interface=interface)


@pytest.mark.parametrize("interface", ["lo", " lo ", "127.0.0.1", "127.0.0.0/8"])
def test_an_interface_by_name_address_and_network(interface: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = NetworkOptions.given(interface=interface)
    assert options.addresses()[socket.AF_INET] == "127.0.0.1"
    assert pickle.loads(pickle.dumps(options)) == options
    monkeypatch.setenv("CLOUDCKPT_INTERFACE", interface)
    assert NetworkOptions.given().addresses() == options.addresses()


NO_TEXT = ["", "a-b", "5-3", "0-0", "29600-", "-29600", "29600:29700", "29600-70000"]
NO_PAIRS = [29600, True, (1,), (1, 2, 3), (True, 5), (29600.0, 29700.0), range(29600, 29700)]


@pytest.mark.parametrize("ports", NO_TEXT + NO_PAIRS)
def test_a_port_range_that_is_none_is_refused(ports: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"port_range=.* is not a range of ports.*'29600-29699'"):
        NetworkOptions.given(port_range=ports)


@pytest.mark.parametrize("ports", ["29600-29699", " 29600 - 29699 ", (29600, 29699), [29600, 29699]])
def test_a_port_range_as_text_and_as_a_pair(ports: Any) -> None:
    assert NetworkOptions.given(port_range=ports).ports == (29600, 29699)


def test_a_port_serves_again_at_once_after_its_server_has_closed_connections() -> None:
    options = NetworkOptions(ports=(port := one_free_port(), port))
    with closing(options.listen("127.0.0.1")) as listener:
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = listener.accept()
        accepted.close()  # the side that closes first keeps the port for a minute
        assert client.recv(1) == b""
        client.close()
        with pytest.raises(ConfigurationError, match="Address already in use"):
            options.listen("127.0.0.1")  # while another socket listens
    options.listen("127.0.0.1").close()


def test_an_address_that_is_not_here_is_not_told_as_a_port_that_is_taken() -> None:
    with pytest.raises(OSError, match="assign"):
        NetworkOptions(ports=(port := one_free_port(), port)).listen("203.0.113.1")


def test_ports_that_are_reserved_for_root_are_told_so() -> None:
    script = (
        "import os, sys; from cloudckpt.executor.network.network_options import NetworkOptions\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "try: NetworkOptions(ports=(1, 9)).listen('127.0.0.1')\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ
    ).stdout
    assert "ConfigurationError" in told and "Permission denied" in told and "1024" in told


def test_torch_has_what_gives_gloo_an_address() -> None:
    gloo: Any = ProcessGroupGloo
    assert hasattr(gloo._Options(), "_devices") and hasattr(gloo._Options(), "_timeout")
    assert gloo.create_device(hostname="127.0.0.1") is not None
    assert distributed_c10d.ProcessGroupGloo is ProcessGroupGloo
