"""The settings of the storage comparisons: how far away the server is, and whether it speaks TLS."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

from bench.distance import NAMED, Distance

_SLOW_ONE_IN = 20
_OVER_BOTH = {"near", "far"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `chosen` reads."""
    told = "; ".join(f"{name}: {Distance(link).title.removesuffix(', HTTP')}" for name, link in NAMED.items())
    parser.add_argument(
        "--distance", nargs="+", choices=list(NAMED), default=[], metavar="NAME",
        help=f"where the server is ({told}; default: everywhere)",
    )  # fmt: skip
    parser.add_argument(
        "--tls", action=argparse.BooleanOptionalAction,
        help="over TLS alone, or without it (default: both near and far, TLS elsewhere)",
    )  # fmt: skip
    parser.add_argument(
        "--slow-one-in", type=int, default=0, metavar="N",
        help="every Nth connection is ten times slower, from the third on, where the server is not near",
    )  # fmt: skip
    parser.add_argument("--jitter-ms", type=float, default=0.0, help="of the time on the way (default: 0)")
    parser.add_argument(
        "--slow-start", action="store_true", help="connections start with TCP's initial window"
    )
    parser.add_argument("--refuse-above", type=int, metavar="N", help="answer 503 above N requests a second")


def chosen(options: argparse.Namespace) -> list[Distance]:
    """Return the settings to measure, in their order.

    If the options choose none, far over TLS comes once more, with a slow connection in 20.
    """
    settings = list(_chosen(options))
    if not options.distance and not options.slow_one_in and options.tls is not False:
        slow = {"distance": ["far"], "tls": True, "slow_one_in": _SLOW_ONE_IN}
        settings += _chosen(argparse.Namespace(**{**vars(options), **slow}))
    return settings


def _chosen(options: argparse.Namespace) -> Iterator[Distance]:
    for name in options.distance or NAMED:
        link = NAMED[name]
        if link is not None:
            link = replace(link, jitter=options.jitter_ms / 1e3, slow_one_in=options.slow_one_in)
        both = name in _OVER_BOTH or bool(options.distance)
        for tls in (False, True) if both else (True,):
            if options.tls in (None, tls):
                yield Distance(link, tls, options.slow_start, options.refuse_above)
