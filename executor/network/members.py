"""The addresses that the checkpoint processes of a job use: each rank's own view, and rank 0's choice."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from cloudckpt.backends.config.endpoint_url import host_and_port
from cloudckpt.backends.errors import ExecutorError
from cloudckpt.executor.network import host_addresses
from cloudckpt.executor.network.host_addresses import FAMILY_NAMES, IP_FAMILIES, Family, Route
from cloudckpt.executor.network.network_options import NetworkOptions


@dataclass(frozen=True, slots=True)
class Member:
    """A rank and the addresses that it could use, as it sees them.

    Attributes:
        rank: its rank.
        host: its host's name.
        namespace: the same on ranks that share a loopback interface.
        own: its addresses by the number of their family.
        preferred: family of the connection to the store.
        store_at: the store's address on that connection.
        at_store: the store is on this host.
        fixed: `own` was set by an option.
        why: the reason for the choice, in words.
    """

    rank: int
    host: str
    namespace: str
    own: dict[int, str]
    preferred: int
    store_at: str
    at_store: bool
    fixed: bool
    why: str

    @classmethod
    def here(cls, rank: int, host: str, port: int, options: NetworkOptions, timeout: float) -> Self:
        """Return this rank as a member. It connects to the store at `host` and `port`.

        Raises:
            ConfigurationError: the interface of `options` is not on this host.
            OSError: the store can't be reached within `timeout` seconds.
        """
        route = host_addresses.route_to(host, port, timeout)
        chosen = options.addresses()
        if chosen:
            why = f"{options.source.rstrip('=')} is {options.interface}"
        else:
            chosen = _other_families(host, route) | {host_addresses.family_of(route.local): route.local}
            why = f"it reaches the store at {host_and_port(route.remote, port)} from there"
        return cls(
            rank=rank,
            host=socket.gethostname(),
            namespace=host_addresses.network_namespace(),
            own={int(family): address for family, address in chosen.items()},
            preferred=int(host_addresses.family_of(route.local)),
            store_at=route.remote,
            at_store=route.ends_here,
            fixed=options.interface is not None,
            why=why,
        )

    def fields(self) -> dict[str, Any]:
        """Return the member as JSON takes it."""
        return asdict(self)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Self:
        """Return the member that `fields` came from."""
        own = {int(family): address for family, address in fields["own"].items()}
        values: dict[str, Any] = {**fields, "own": own}
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Plan:
    """The choice that rank 0 makes for all ranks.

    Attributes:
        family: number of the address family that all ranks use.
        store_at: address at which ranks of other hosts reach the store; None if all ranks are on its host.
        peer: an address on another host than the store's; None if there is none.
        leads: the first rank of each host.
        has_ports: only ports of a range may be listened on.
    """

    family: int
    store_at: str | None
    peer: str | None
    leads: tuple[int, ...]
    has_ports: bool

    @property
    def has_one_host(self) -> bool:
        """True if all ranks share a loopback interface."""
        return len(self.leads) == 1

    @classmethod
    def of(cls, members: Sequence[Member], *, has_ports: bool) -> Self:
        """Choose the family and the addresses.

        Raises:
            ExecutorError: no family has an address on every rank.
        """
        family = _common_family(members)
        remote = [one for one in members if not one.at_store]
        seen = Counter(one.store_at for one in remote if host_addresses.family_of(one.store_at) == family)
        leads: dict[str, Member] = {}
        for one in members:
            leads.setdefault(one.namespace, one)
        elsewhere = [one.own[family] for one in remote if family in one.own]
        return cls(
            family=family,
            store_at=seen.most_common(1)[0][0] if seen else None,
            peer=elsewhere[0] if elsewhere else None,
            leads=tuple(one.rank for one in leads.values()),
            has_ports=has_ports,
        )

    def fields(self) -> dict[str, Any]:
        """Return the plan as JSON takes it."""
        return asdict(self)

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> Self:
        """Return the plan that `fields` came from."""
        values: dict[str, Any] = {**fields, "leads": tuple(fields["leads"])}
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Choice:
    """The address of a rank, and the reason for it."""

    rank: int
    host: str
    address: str
    why: str

    def __str__(self) -> str:
        interface = host_addresses.interface_of(self.address)
        named = f"{self.address} ({interface})" if interface else self.address
        return f"rank {self.rank} on host {self.host} uses {named}: {self.why}"


def choose(member: Member, plan: Plan) -> Choice:
    """Return the address of a rank by the plan.

    A rank on the store's own host sees an address that may mean something there alone. It takes the one at
    which the other hosts reach the store, if that is this host's, or the one from which it sends to them.

    Raises:
        ExecutorError: the rank's only address reaches no other host.
    """
    own = member.own.get(plan.family)
    if member.fixed or plan.has_one_host or not member.at_store:
        if own is None:  # ruled out by the plan
            raise _without_family(member, plan.family)
        return Choice(member.rank, member.host, own, member.why)
    if plan.store_at is not None and host_addresses.belongs_here(plan.store_at):
        why = "the ranks of other hosts reach the store there"
        return Choice(member.rank, member.host, plan.store_at, why)
    source = host_addresses.source_for(plan.peer) if plan.peer is not None else None
    if source is not None and not host_addresses.is_loopback(source):
        return Choice(member.rank, member.host, source, f"it sends to {plan.peer} on another host from there")
    if own is not None and not host_addresses.is_loopback(own):
        return Choice(member.rank, member.host, own, member.why)
    raise ExecutorError(
        f"rank {member.rank} on host {member.host} found no address at which other hosts reach it: it "
        f"reaches the store at {member.store_at}{said_by_hosts(member.store_at)}, and has no route to "
        f"{plan.peer}",
        rank=member.rank,
        hint="Name the interface or address with interface= or CLOUDCKPT_INTERFACE",
    )


def said_by_hosts(address: str) -> str:
    """Return what ``/etc/hosts`` says of an address, in parentheses; nothing if it doesn't name it."""
    lines = host_addresses.hosts_lines(address)
    return f" (/etc/hosts has '{lines[0]}')" if lines else ""


def _other_families(host: str, route: Route) -> dict[Family, str]:
    """Return the addresses from which this host would reach the store's other addresses."""
    found: dict[Family, str] = {}
    for remote in host_addresses.addresses_of(host):
        family = host_addresses.family_of(remote)
        source = host_addresses.source_for(remote) if family not in found else None
        if source is not None and host_addresses.is_loopback(source) == host_addresses.is_loopback(
            route.local
        ):
            found[family] = source
    return found


def _common_family(members: Sequence[Member]) -> int:
    wanted = Counter(one.preferred for one in members if not one.at_store) or Counter(
        one.preferred for one in members
    )
    ranked = [family for family, _ in wanted.most_common()]
    ranked += [int(family) for family in IP_FAMILIES if family not in ranked]
    for family in ranked:
        # A rank on the store's host finds its address by the plan.
        if all(family in one.own or (one.at_store and not one.fixed) for one in members):
            return family
    for one in members:
        if ranked[0] not in one.own:
            raise _without_family(one, ranked[0])
    raise AssertionError(members)


def _without_family(member: Member, family: int) -> ExecutorError:
    name = FAMILY_NAMES[socket.AddressFamily(family)]
    has = ", ".join(member.own.values()) or "none"
    return ExecutorError(
        f"rank {member.rank} on host {member.host} has no {name} address, which other ranks use "
        f"({has}: {member.why})",
        rank=member.rank,
        hint="Name an address of one family on every host with interface= or CLOUDCKPT_INTERFACE, "
        "such as a network 10.0.0.0/8",
    )
