"""What saving and loading cost on GCS, beside the S3 store and stock DCP over gcsfs: part of `make bench`.

Run as `python -m bench.gcs` with `tests` on the module search path. Every form saves and loads the same
bytes through DCP, by turns; the first turn of each doesn't count. GCS is the server of the tests, S3 the one
of the other comparisons, each in memory and in a process of its own. The two servers differ in what they
cost, so the seconds of the client's processor are what can be compared, and between the two forms on GCS
the wall time, too.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import cloudckpt
from bench.endpoint import served
from bench.growth import reached
from bench.report import machine
from bench.turns import Form, parser, run
from support.dcp_fsspec import FsspecReader, FsspecWriter
from support.gcs import GCSServer, gcs_server
from support.servers import S3Server


def forms(s3: S3Server, gcs: GCSServer) -> dict[str, Form]:
    """All that are compared, each in a bucket of its own; ours overwrites what was there before."""
    on_s3, on_gcs, by_stock = s3.new_bucket(), gcs.new_bucket(), gcs.new_bucket()
    stock: dict[str, Any] = {"endpoint_url": gcs.endpoint, "token": "anon", "use_listings_cache": False}
    return {
        "cloudckpt, gs://": Form(
            lambda _: cloudckpt.StorageWriter(f"gs://{on_gcs}/c", overwrite=True, endpoint_url=gcs.endpoint),
            lambda _: cloudckpt.StorageReader(f"gs://{on_gcs}/c", endpoint_url=gcs.endpoint),
        ),
        "cloudckpt, s3://": Form(
            lambda _: cloudckpt.StorageWriter(f"s3://{on_s3}/c", overwrite=True, **reached(s3)),
            lambda _: cloudckpt.StorageReader(f"s3://{on_s3}/c", **reached(s3)),
        ),
        "stock DCP, gcsfs": Form(
            lambda name: FsspecWriter(f"gs://{by_stock}/{name}", sync_files=False, **stock),
            lambda name: FsspecReader(f"gs://{by_stock}/{name}", **stock),
        ),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = parser("gcs", __doc__, gib=1.0, small=500, repeats=3).parse_args(arguments)
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # else stock asks each bucket's type over gRPC
    console = Console()
    with served() as endpoint, gcs_server("--no-md5") as gcs:
        facts = machine(Path(tempfile.gettempdir()))
        console.print(
            f"{facts['cores']} cores ({facts['processor']}), load {facts['load']:.1f}", markup=False
        )
        run(lambda: forms(endpoint.server, gcs), options, facts, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
