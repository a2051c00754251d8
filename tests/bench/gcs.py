"""What saving and loading cost on GCS, beside gcsfs and obstore: part of `make bench`.

Run as `python -m bench.gcs` with `tests` on the module search path. It is the comparison of `bench.storage`,
with the GCS server of the tests instead, in memory and in a process of its own. That server costs more than
the S3 server, so the walls of the two comparisons differ; the seconds of the client's processor can be
compared.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil

from bench.contest import Storage
from bench.endpoint import Counts
from bench.peers import LIMITED, OURS, Opened, Peer, Place, cloudckpt_at, through_fsspec
from bench.storage import compare, parser
from support.gcs import GCSServer, gcs_server


class OnGCS:
    """The server of the tests; it counts requests, and no bytes."""

    def __init__(self, server: GCSServer) -> None:
        self.running = server
        # gcsfs would ask each bucket's type over gRPC.
        self.environment: Mapping[str, str] = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        self._process = psutil.Process(server.pid)
        self._cpu = self._cpu_seconds()

    def _cpu_seconds(self) -> float:
        family = [self._process, *self._process.children(recursive=True)]
        times = [process.cpu_times() for process in family]
        return sum(one.user + one.system for one in times)

    def reset(self) -> None:
        self.running.reset()
        self._cpu = self._cpu_seconds()

    def counts(self) -> Counts:
        requests = Counter(method for method, *_ in self.running.requests())
        return Counts(dict(requests), 0, 0, self._cpu_seconds() - self._cpu)

    def empty(self, bucket: str) -> None:
        for name in self.running.names(bucket, ""):
            self.running.remove(bucket, name)


@contextmanager
def on_gcs() -> Iterator[Storage]:
    """Run a GCS server."""
    with gcs_server("--no-md5") as server:
        yield OnGCS(server)


def _reached(place: Place) -> dict[str, Any]:
    return {"endpoint_url": place.server.endpoint}


@contextmanager
def gcsfs(place: Place) -> Iterator[Peer]:
    yield through_fsspec(place, endpoint_url=place.server.endpoint, token="anon", use_listings_cache=False)  # noqa: S106


@contextmanager
def obstore(place: Place) -> Iterator[Peer]:
    """obstore's file system, which uses the XML API. What it saves through DCP doesn't load: see
    `bench.peers`."""
    from obstore.fsspec import register  # noqa: PLC0415 - by the process that measures it alone

    register("gs")
    key = {
        "gcs_base_url": place.server.endpoint,
        "disable_oauth": True,
        "client_email": "",
        "private_key": "",
    }
    yield through_fsspec(
        place,
        service_account_key=json.dumps({**key, "private_key_id": ""}),
        client_options={"allow_http": True},
    )


GCS_PEERS: Mapping[str, Opened] = {
    OURS: partial(cloudckpt_at, _reached),
    LIMITED: partial(cloudckpt_at, _reached, memory_limit="256MiB"),
    "gcsfs": gcsfs,
    "obstore": obstore,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where cloudckpt itself failed or loaded something else than was saved."""
    return compare(parser("gcs", __doc__, GCS_PEERS).parse_args(arguments), GCS_PEERS, on_gcs)


if __name__ == "__main__":
    sys.exit(main())
