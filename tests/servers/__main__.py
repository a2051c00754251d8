"""Ask every installed server that speaks S3 or GCS what it does: what `make servers` runs.

Each server is started on loopback and asked by plain requests, not by the library. The tables that are
printed are those of docs/servers.md. `tests/test_servers.py` compares the two.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from servers import asked


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of all servers, or of those that are named."""
    parser = argparse.ArgumentParser(prog="servers", description=__doc__)
    names = [*asked.S3, *asked.GCS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="SERVER", help=", ".join(names)
    )
    options = parser.parse_args(arguments)
    print(asked.page(options.only))  # noqa: T201 - a command
    return 0


if __name__ == "__main__":
    sys.exit(main())
