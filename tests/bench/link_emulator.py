"""A network link with a round-trip time and rates, for packets that a router forwards: the process of
`bench.distance`.

Run as `python -m bench.link_emulator` in the router's network namespace, it needs nothing but the standard
library. The router's netfilter rules send each packet to one of two NFQUEUE queues, one a direction, and the
packets wait in the kernel. This process sees their headers alone, decides when each packet leaves, and gives
its verdict then. So TCP runs over the link as it does over a real one, and a byte costs this process
nothing: a packet of TCP's segmentation offload has up to 64 KiB.
"""

from __future__ import annotations

import argparse
import heapq
import random
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

_NETLINK_NETFILTER = 12
_SUBSYSTEM_QUEUE = 3
_PACKET, _VERDICT, _CONFIG = (_SUBSYSTEM_QUEUE << 8 | message for message in (0, 1, 2))
_ERROR = 2
_REQUEST, _ACK = 1, 4
_ATTRIBUTE_PACKET_HEADER, _ATTRIBUTE_VERDICT_HEADER, _ATTRIBUTE_PAYLOAD = 1, 2, 10
_CONFIG_COMMAND, _CONFIG_PARAMETERS, _CONFIG_MAX_LENGTH, _CONFIG_MASK, _CONFIG_FLAGS = 1, 2, 3, 4, 5
_COMMAND_BIND = 1
_COPY_PACKET = 2
_FLAG_GSO = 4
_NF_ACCEPT = 1
_SO_RCVBUFFORCE = 33

_HEADERS = 60
"""Bytes of each packet that the kernel shows: IP's header and the start of TCP's."""
_QUEUE_LENGTH = 1 << 17
"""Packets that may wait in each queue."""
_TICK = 0.0004
"""Seconds for which the process sleeps at least, so that it decides on several packets at once."""
_SYN, _ACK_FLAG = 0x02, 0x10
_VERDICT_MESSAGE = struct.Struct("=IHHII BBH HHII")
_LENGTH_OF_VERDICT = 32


@dataclass(slots=True)
class Connection:
    """One TCP connection's place on the link, in one direction."""

    rate: float
    """Bytes a second."""
    free: float = 0.0
    """When its rate lets the next packet go."""
    latest: float = 0.0
    """When its latest packet arrives: no packet overtakes another one of its connection."""


@dataclass(frozen=True, slots=True)
class PeerConnection:
    """What the link is like. Rates are in bytes a second, times in seconds."""

    rtt: float
    rate: float | None = None
    """Of each connection and direction."""
    host_rate: float | None = None
    """Of all connections together, in each direction. The hosts see to it: their TCP must know what has not
    left."""
    jitter: float = 0.0
    """Added to a packet's delay on each way: up to so much."""
    slow_one_in: int = 0
    """Every so many connections, beginning with the third, one is slow."""
    slow_factor: float = 10.0

    def rate_of(self, number: int) -> float:
        """Return the rate of the connection with that number, counted from 1."""
        rate = self.rate or float("inf")
        slow = self.slow_one_in and (number - 3) % self.slow_one_in == 0
        return rate / self.slow_factor if slow else rate


@dataclass(slots=True)
class Direction:
    """The packets on one way, each waiting for its time."""

    link: PeerConnection
    connections: dict[int, Connection] = field(default_factory=dict[int, Connection])
    """By the client's port."""
    _flying: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    """A heap of the packets that are on their way, by the time at which they arrive."""
    _random: random.Random = field(default_factory=lambda: random.Random(27))

    def add(self, now: float, packet: int, size: int, connection: Connection) -> None:
        """Take a packet, which waits for its connection's rate and then travels."""
        connection.free = max(now, connection.free) + size / connection.rate
        arrives = connection.free + self.link.rtt / 2
        if self.link.jitter:
            arrives += self._random.random() * self.link.jitter
        connection.latest = arrives = max(arrives, connection.latest)
        heapq.heappush(self._flying, (arrives, packet))

    def due(self, now: float) -> list[int]:
        """Return the packets that arrive now, in their order."""
        due: list[int] = []
        flying = self._flying
        while flying and flying[0][0] <= now:
            due.append(heapq.heappop(flying)[1])
        return due

    def next_event(self) -> float:
        """Return when the next packet arrives."""
        return self._flying[0][0] if self._flying else float("inf")


class Queue:
    """A netfilter queue: the kernel holds its packets until they get their verdict."""

    def __init__(self, number: int) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self.socket.bind((0, 0))
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        self._number = number
        self._buffer = bytearray(4096)
        self._configure(_attribute(_CONFIG_COMMAND, struct.pack(">BxH", _COMMAND_BIND, socket.AF_INET)))
        self._configure(
            _attribute(_CONFIG_PARAMETERS, struct.pack(">IB", _HEADERS, _COPY_PACKET))
            + _attribute(_CONFIG_MAX_LENGTH, struct.pack(">I", _QUEUE_LENGTH))
            + _attribute(_CONFIG_MASK, struct.pack(">I", _FLAG_GSO))
            + _attribute(_CONFIG_FLAGS, struct.pack(">I", _FLAG_GSO))
        )
        self.socket.setblocking(False)

    def _configure(self, attributes: bytes) -> None:
        head = struct.pack(
            "=IHHII BB", 20 + len(attributes), _CONFIG, _REQUEST | _ACK, 0, 0, socket.AF_INET, 0
        )
        self.socket.send(head + struct.pack(">H", self._number) + attributes)
        answer = self.socket.recv(4096)
        kind, code = struct.unpack_from("=H", answer, 4)[0], struct.unpack_from("=i", answer, 16)[0]
        if kind != _ERROR or code:
            raise OSError(-code, f"netfilter queue {self._number} refused its configuration")

    def packet(self) -> tuple[int, bytes] | None:
        """Return a packet's number and its headers, or None if no packet waits."""
        try:
            count = self.socket.recv_into(self._buffer)
        except BlockingIOError:
            return None
        number, position = -1, 20
        while position < count:
            length, kind = struct.unpack_from("=HH", self._buffer, position)
            if kind == _ATTRIBUTE_PACKET_HEADER:
                number = struct.unpack_from(">I", self._buffer, position + 4)[0]
            elif kind == _ATTRIBUTE_PAYLOAD:
                return number, bytes(self._buffer[position + 4 : position + length])
            position += (length + 3) & ~3
        raise OSError(f"netfilter queue {self._number} sent a message without a packet")

    def accept(self, packets: Sequence[int]) -> None:
        """Let packets go on."""
        queue = socket.htons(self._number)
        for first in range(0, len(packets), 128):
            self.socket.send(
                b"".join(
                    _VERDICT_MESSAGE.pack(
                        *(_LENGTH_OF_VERDICT, _VERDICT, _REQUEST, 0, 0, socket.AF_INET, 0, queue),
                        *(12, _ATTRIBUTE_VERDICT_HEADER, socket.htonl(_NF_ACCEPT), socket.htonl(packet)),
                    )
                    for packet in packets[first : first + 128]
                )
            )


def _attribute(kind: int, value: bytes) -> bytes:
    padding = b"\0" * (-len(value) % 4)
    return struct.pack("=HH", 4 + len(value), kind) + value + padding


class Emulator:
    """Both directions of the link. Queue 0 has the packets to the server, queue 1 those to the client."""

    def __init__(self, link: PeerConnection) -> None:
        self._link = link
        self._queues = [Queue(0), Queue(1)]
        self._directions = [Direction(link), Direction(link)]
        self._count = 0

    def run(self) -> None:
        """Serve until the process is killed."""
        sockets = [queue.socket for queue in self._queues]
        waits = _TICK
        while True:
            ready, _, _ = select.select(sockets, [], [], None if waits == float("inf") else max(waits, 0.0))
            if ready:
                time.sleep(_TICK)  # more packets come in the meantime
            for way, queue in enumerate(self._queues):
                now = time.monotonic()
                if queue.socket in ready:
                    self._take(way, queue, now)
                due = self._directions[way].due(now)
                if due:
                    queue.accept(due)
            now = time.monotonic()
            waits = max(_TICK, min(direction.next_event() for direction in self._directions) - now)

    def _take(self, way: int, queue: Queue, now: float) -> None:
        direction = self._directions[way]
        while (found := queue.packet()) is not None:
            number, headers = found
            length = (headers[0] & 15) * 4
            size = headers[2] << 8 | headers[3]
            port_at = length + 2 * way
            port = headers[port_at] << 8 | headers[port_at + 1]
            if not way and headers[length + 13] & (_SYN | _ACK_FLAG) == _SYN and port:
                self._open(port)
            connection = direction.connections.get(port)
            if connection is None:
                self._open(port)
                connection = direction.connections[port]
            direction.add(now, number, size, connection)

    def _open(self, port: int) -> None:
        self._count += 1
        rate = self._link.rate_of(self._count)
        for direction in self._directions:
            direction.connections[port] = Connection(rate)


def main(arguments: Sequence[str] | None = None) -> None:
    """Bind the queues, print a line, and emulate the link."""
    parser = argparse.ArgumentParser(prog="bench.link_emulator", description=__doc__)
    parser.add_argument("--rtt", type=float, required=True, help="seconds")
    parser.add_argument("--rate", type=float, help="bytes a second of each connection")
    parser.add_argument("--jitter", type=float, default=0.0, help="seconds")
    parser.add_argument("--slow-one-in", type=int, default=0)
    parser.add_argument("--slow-factor", type=float, default=10.0)
    emulator = Emulator(PeerConnection(**vars(parser.parse_args(arguments))))
    print("ready", flush=True)  # noqa: T201 - for the process that waits for it
    emulator.run()


if __name__ == "__main__":
    main()
