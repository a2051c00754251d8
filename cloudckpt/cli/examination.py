"""``cloudckpt doctor``: what was tried, what came of it, and what to do."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Final

from rich.text import Text

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.system.printable import one_line
from cloudckpt.cli import output
from cloudckpt.doctor import Finding, Rendezvous, examine
from cloudckpt.executor.network.network_options import NetworkOptions

_STYLES: Final[Mapping[str, str]] = {
    "ok": "green",
    "warning": "yellow",
    "failed": "bold red",
    "unknown": "cyan",
}
_STATES: Final = len("warning")
_CHECKS: Final = len("shared memory")
_NARROWEST: Final = 20
"""Columns that text is given on the narrowest terminal."""


def doctor(
    target: Target,
    *,
    state_size: int | None,
    ranks: int,
    rendezvous: Rendezvous | None,
    network: NetworkOptions,
    as_json: bool,
) -> bool:
    """Examine a place, print each finding as it is made, and tell whether none failed.

    Raises:
        ConfigurationError: an option can't be used, or a library is missing.
    """
    if as_json:
        findings = examine(target, state_size=state_size, ranks=ranks, rendezvous=rendezvous, network=network)
    else:
        output.say(target.uri, "bold")
        findings = examine(
            target, state_size=state_size, ranks=ranks, rendezvous=rendezvous, network=network, found=_say
        )
    ok = all(finding.state != "failed" for finding in findings)
    if as_json:
        listed = [dataclasses.asdict(finding) for finding in findings]
        output.say_json({"uri": target.uri, "ok": ok, "findings": listed})
    else:
        _sum_up(findings)
    return ok


def _say(finding: Finding) -> None:
    """Print a finding: what wraps on a terminal stays right of its name."""
    lines = [Text(one_line(finding.what))]
    if finding.action and finding.action not in finding.advice:
        lines.append(Text(one_line(f"It takes {finding.action}"), "bold"))
    if finding.advice:
        lines.append(Text(one_line(finding.advice), "bold"))
    console = output.answers()
    margin = Text.assemble(
        (f"{finding.state:{_STATES}}", _STYLES.get(finding.state, "dim")), f"  {finding.check:{_CHECKS}}  "
    )
    room = max(_NARROWEST, console.width - margin.cell_len)
    for line in lines:
        for piece in line.wrap(console, room):
            piece.rstrip()
            console.print(Text.assemble(margin, piece), soft_wrap=True)
            margin = Text(" " * margin.cell_len)


def _sum_up(findings: list[Finding]) -> None:
    counts = Counter(finding.state for finding in findings)
    if counts["failed"]:
        worst = f"a job can't checkpoint here as it should: {output.count(counts['failed'], 'check')} failed"
        style = "bold red"
    else:
        worst, style = "a job can checkpoint here", "green"
    beside = f", {output.count(counts['warning'], 'warning')}" if counts["warning"] else ""
    output.say(f"{worst}{beside}", style)
