"""Benchmarks of a store from this machine: latency of requests, throughput of uploads and downloads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.manage.probe_objects import ProbeObjects
from cloudckpt.backends.save.object_layout import check_part_size
from cloudckpt.backends.save.uploader import Observer
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.transfer.request_limit import at_first, transfers
from cloudckpt.bench.advice import Advice, Measured, Setting, advised
from cloudckpt.bench.measure import Bench
from cloudckpt.bench.plan import Plan, plan_for

__all__ = ["Advice", "Measured", "Plan", "Report", "Setting", "bench", "planned"]

SECONDS: Final = 60.0
"""Seconds of measurement, at most and about: a round that has started is ended."""


@dataclass(frozen=True, slots=True)
class Report:
    """The measurements of a place, and advice on options."""

    uri: str
    size: int
    """Bytes that were moved at a time."""
    present: Setting
    latencies: dict[str, float]
    """Seconds of a small ``put``, ``stat``, ``get`` and ``delete``."""
    up: tuple[Measured, ...]
    down: tuple[Measured, ...]
    saving: Advice
    loading: Advice
    left: tuple[str, ...]
    """Names of objects that could not be deleted."""


def planned(target: Target, size: int) -> Plan:
    """Plan what is to be measured at a place, by moving ``size`` bytes at a time; no request is made.

    The more bytes, the less noise, and the more requests concurrently can be distinguished.

    Raises:
        ConfigurationError: an option can't be used, or a library is missing.
    """
    with open_store(target) as store:
        check_part_size(target.options, store.part_limits, target.uri)
        usual = at_first(transfers(store, target.options))
        options = target.options.model_copy(update={"concurrency": usual})
        return plan_for(options, store.part_limits, size)


def bench(
    target: Target,
    plan: Plan,
    *,
    seconds: float = SECONDS,
    observer: Observer = lambda _name, _nbytes: None,
) -> Report:
    """Measure what this machine reaches to a place, by the library's own transfers.

    Objects with hidden names are put below the URI, and deleted again in any case. It holds about
    twice the plan's size of memory, and at most 576 MiB, beside ``memory_limit``.

    Args:
        target: the URI, with the options that the job has.
        plan: what is to be tried there.
        seconds: how long it measures, about.
        observer: called with bytes that have been moved.

    Raises:
        StorageError: the store failed.
    """
    with open_store(target) as store:
        probe_objects = ProbeObjects(store)
        try:
            measuring = Bench(store, target.options, probe_objects, plan.size, observer)
            latencies = measuring.latencies()
            up = measuring.up(plan.up, seconds / 2)
            down = measuring.down(plan.down, seconds / 2)
        except BaseException as error:  # Ctrl-C too
            if left := probe_objects.clear():
                error.add_note(f"could not be deleted: {', '.join(left)}")
            raise
        left = probe_objects.clear()
    saving, loading = advised(up, plan.present), advised(down, plan.present, parts=False)
    return Report(target.uri, plan.size, plan.present, latencies, up, down, saving, loading, left)
