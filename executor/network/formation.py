"""The group of a job's checkpoint processes: gloo where hosts reach each other, else a store."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from cloudckpt.backends.config.endpoint_url import host_and_port
from cloudckpt.backends.system.printable import one_line
from cloudckpt.executor.coordination.rendezvous import MeetingPlace
from cloudckpt.executor.network import gloo, probe, store_group
from cloudckpt.executor.network.agreement import Agreement
from cloudckpt.executor.network.members import Choice, Member, Plan, choose
from cloudckpt.executor.network.network_options import NetworkOptions
from cloudckpt.executor.network.probe import Peer, ProbeListener

_PROBE_SHARE: Final = 0.2
_CONNECT_SHARE: Final = 0.6
"""Shares of the time that is left for the probe, and for connections of the group: another way may follow."""


@dataclass(frozen=True, slots=True)
class Network:
    """The network of one checkpoint process.

    Attributes:
        choice: its address, and why.
        carrier: what its collectives go through.
        obstacle: what the group has to do without, and why: the same on every rank; None if nothing failed.
        server: the store that this process opened for the group; it serves as long as it is referenced.
    """

    choice: Choice
    carrier: str
    obstacle: str | None = None
    server: TCPStore | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.choice}; its collectives go through {self.carrier}"

    @property
    def warning(self) -> str | None:
        """The obstacle with its consequence and cure; None if there is none."""
        if self.obstacle is None:
            return None
        return (
            f"the checkpoint processes can't reach each other: {self.obstacle}. Their collectives go through "
            f"{self.carrier} instead, which is slower. Open the ports that the system chooses "
            "(ip_local_port_range) between the hosts, or give port_range= and open these ports on the first "
            "rank's host. If the address is wrong, name the interface with interface= or CLOUDCKPT_INTERFACE"
        )


@dataclass(frozen=True, slots=True)
class Formation:
    """One attempt of all ranks to form a group.

    Args:
        place: where the ranks meet.
        name: prefix in the store, never used before.
        options: of this rank; those of rank 0 decide about ports.
        deadline: by `time.monotonic`.
        collective_timeout: seconds that a collective of the group may take.
    """

    place: MeetingPlace
    name: str
    options: NetworkOptions
    deadline: float
    collective_timeout: float

    def form(self) -> Network:
        """Agree on addresses, prove them, and make the group the default one of this process.

        Every rank calls it. Collectives go through gloo. If `options` has ports they go through a store that
        rank 0 opens, because gloo takes no port. Where ranks can't reach each other, they go through
        the store of `place`.

        Raises:
            ConfigurationError: this host has no such interface, or no port of the range is free.
            ExecutorError: a rank or the store can't be reached, or there is no common address.
        """
        place = self.place
        left = max(1.0, self.deadline - time.monotonic())
        agreement = Agreement(place.connect(self.name, left), place.rank, place.world_size, self.deadline)
        member = self._member(left)
        agreement.publish(f"member/{place.rank}", member.fields())
        if place.rank == 0:
            published = agreement.read_all(f"member/{rank}" for rank in range(place.world_size))
            members = [Member.of(fields) for fields in published]
            agreement.publish("plan", Plan.of(members, has_ports=self.options.ports is not None).fields())
        plan = Plan.of_fields(agreement.read("plan"))
        choice = choose(member, plan)
        if plan.has_ports:
            network = self._over_own_store(agreement, choice)
        else:
            network = self._over_gloo(agreement, choice, plan)
        if network is not None:
            return network
        store = place.connect(f"{self.name}/collectives", agreement.left)
        self._carry(store)
        carrier = f"the store at {place.at}"
        return Network(choice, carrier, obstacle=agreement.reason())

    def _member(self, timeout: float) -> Member:
        place = self.place
        try:
            return Member.here(place.rank, place.host, place.port, self.options, timeout)
        except OSError as error:
            raise place.unreachable(error) from error

    def _carry(self, store: Store) -> None:
        store_group.become_default(store, self.place.rank, self.place.world_size, self.collective_timeout)

    def _over_gloo(self, agreement: Agreement, choice: Choice, plan: Plan) -> Network | None:
        """Return None if a rank can't reach another, once every rank knows."""
        obstacle = None if plan.has_one_host else _obstacle(agreement, choice, plan)
        if obstacle is not None:
            agreement.decide(obstacle)
            return None
        ends = time.monotonic() + _CONNECT_SHARE * agreement.left
        mesh = gloo.Mesh(
            choice.address,
            self.place.connect(f"{self.name}/gloo", agreement.left),
            self.place.rank,
            self.place.world_size,
        )
        host = f"host {choice.host} ({choice.address})"
        failure: str | None = f"{host} could not connect to every rank in time"
        try:
            with contextlib.suppress(gloo.GivenUp):
                mesh.connect(
                    ends - time.monotonic(), lambda: agreement.is_decided() or time.monotonic() > ends
                )
                failure = None
        except RuntimeError as error:
            failure = f"{host} could not connect to every rank: {one_line(error)}"
        if agreement.decide(failure) is not None:
            return None
        mesh.become_default(self.collective_timeout)
        return Network(choice, "gloo")

    def _over_own_store(self, agreement: Agreement, choice: Choice) -> Network | None:
        """Return None if a rank can't reach the store of rank 0, once every rank knows."""
        server = self._opened(agreement, choice) if self.place.rank == 0 else None
        at = agreement.read("server")
        if at is None:
            return None
        address, port = at
        own, failure = None, None
        try:
            seconds = timedelta(seconds=_CONNECT_SHARE * agreement.left)
            own = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=seconds)
        except DistError as error:
            failure = (
                f"host {choice.host} ({choice.address}) can't reach the first rank's host at "
                f"{host_and_port(address, port)}: {one_line(error)}"
            )
        if agreement.decide(failure) is not None or own is None:
            return None
        self._carry(PrefixStore(self.name, own))
        carrier = f"a store that the first rank has opened at {host_and_port(address, port)}"
        return Network(choice, carrier, server=server)

    def _opened(self, agreement: Agreement, choice: Choice) -> TCPStore | None:
        """Open the store of rank 0 and publish its address; None if this host can't listen there."""
        try:
            listener = self.options.listen(choice.address)
        except OSError as error:
            agreement.decide(_cannot_listen(choice, error))
            agreement.publish("server", None)
            return None
        port = listener.getsockname()[1]
        server = TCPStore(
            choice.address,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        agreement.publish("server", [choice.address, port])
        return server


def _obstacle(agreement: Agreement, choice: Choice, plan: Plan) -> str | None:
    """Have every host connect to the others, and return what failed; None if nothing did."""
    with contextlib.ExitStack() as stack:
        if choice.rank in plan.leads:
            port, failed = 0, list[str]()
            try:
                listener = stack.enter_context(ProbeListener(NetworkOptions().listen(choice.address)))
                port = listener.port
            except OSError as error:
                failed = [_cannot_listen(choice, error)]
            agreement.publish(f"lead/{choice.rank}", [choice.host, choice.address, port])
            published = agreement.read_all(f"lead/{rank}" for rank in plan.leads)
            peers = [
                Peer(*fields)
                for rank, fields in zip(plan.leads, published, strict=True)
                if rank != choice.rank
            ]
            agreement.publish(f"probed/{choice.rank}", failed or _failures(choice, peers, agreement.left))
        if choice.rank == 0:
            published = agreement.read_all(f"probed/{rank}" for rank in plan.leads)
            agreement.publish("obstacles", [text for host in published for text in host])
        found = agreement.read("obstacles")
    if not found:
        return None
    return str(found[0]) + (f" (and {len(found) - 1} more such)" if len(found) > 1 else "")


def _cannot_listen(choice: Choice, error: OSError) -> str:
    reason = os.strerror(error.errno) if error.errno else one_line(error)
    return f"host {choice.host} can't listen on {choice.address}: {reason}"


def _failures(choice: Choice, peers: list[Peer], left: float) -> list[str]:
    for peer in peers:
        if peer.address == choice.address:
            return [f"hosts {choice.host} and {peer.host} both use the address {choice.address}"]
    there = [peer for peer in peers if peer.port and probe.initiates(choice.address, peer.address)]
    return probe.failures(choice.host, choice.address, there, min(probe.LONGEST, _PROBE_SHARE * left))
