"""``cloudckpt bench``: what this machine reaches to a store, and which options it advises."""

from __future__ import annotations

import dataclasses
from typing import Any

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.system.printable import one_line
from cloudckpt.bench import Advice, Measured, Report, Setting, planned
from cloudckpt.bench import bench as measure
from cloudckpt.cli import output
from cloudckpt.cli.progress import progress


def bench(target: Target, *, size: int, seconds: float, as_json: bool) -> bool:
    """Measure a place, print the figures, and tell whether nothing was left there.

    Raises:
        ConfigurationError: an option can't be used, or a library is missing.
        StorageError: the store failed.
    """
    plan = planned(target, size)
    moved = f"{output.size(plan.most_up)} up and {output.size(plan.most_down)} down"
    output.say(f"moves at most {moved}, in about {seconds:.0f} s", console=output.aside())
    with progress("measuring") as shown:
        shown.begun(plan.most_up + plan.most_down)
        report = measure(target, plan, seconds=seconds, observer=shown.done)
    if as_json:
        output.say_json(_as_dict(report))
    else:
        _say(report)
    return not report.left


def _say(report: Report) -> None:
    output.say(report.uri, "bold")
    taken = (f"{what} {1000 * seconds:.1f} ms" for what, seconds in report.latencies.items())
    output.say(f"a small request: {', '.join(taken)}")
    shown = output.table(
        "way",
        "part_size",
        "concurrency",
        "rate",
        "noise",
        "CPU s/GiB",
        right=("part_size", "concurrency", "rate", "noise", "CPU s/GiB"),
    )
    for way, rates in (("up", report.up), ("down", report.down)):
        for one in rates:
            shown.add_row(
                way,
                output.size(one.setting.part_size) if way == "up" else "",
                f"{one.setting.concurrency}{' *' if one.setting == report.present else '  '}",
                f"{output.size(one.rate)}/s",
                f"{one.noise:.0%}" if len(one.seconds) > 1 else "-",
                f"{one.cpu_per_gib:.2f}",
            )
    output.answers().print(shown)
    output.say("* the present options")
    _advise("saving", report.saving)
    _advise("loading", report.loading)
    if report.left:
        output.say(f"could not be deleted: {', '.join(map(one_line, report.left))}", "red")


def _advise(what: str, advice: Advice) -> None:
    if advice.options:
        output.say(f"{what}: {advice.options} ({advice.why})", "green")
    else:
        output.say(f"{what}: {advice.why}")


def _as_dict(report: Report) -> dict[str, Any]:
    """Return the report for machines."""
    return {
        **dataclasses.asdict(report),
        "up": [_rate(one, report.present) for one in report.up],
        "down": [_rate(one, report.present) for one in report.down],
    }


def _rate(one: Measured, present: Setting) -> dict[str, Any]:
    return {
        **dataclasses.asdict(one.setting),
        "present": one.setting == present,
        "bytes_per_second": one.rate,
        "seconds": one.seconds,
        "cpu_seconds_per_gib": one.cpu_per_gib,
        "noise": one.noise,
    }
