"""An examination of a place: checkpoint there once, and delete everything that was put there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointError, ConfigurationError
from cloudckpt.backends.finding import Finding, State
from cloudckpt.backends.manage.probe_objects import ProbeObjects
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.exam import Exam, open_exam
from cloudckpt.doctor.machine import machine
from cloudckpt.doctor.network import Rendezvous, not_tried, own_name
from cloudckpt.doctor.network import ranks as ranks_meet
from cloudckpt.doctor.tries import Tries
from cloudckpt.executor.network.network_options import NetworkOptions

__all__ = ["Finding", "Rendezvous", "State", "examine"]

_MEETING: Final = 120.0
"""Seconds that ranks have to meet and to reach each other: their commands may be started by hand."""
_RETRIES: Final = 2
_TIMEOUT: Final = 20.0
"""Seconds: who wants to know what is wrong does not want to wait as long as a save would."""


def examine(
    target: Target,
    *,
    state_size: int | None = None,
    ranks: int = 1,
    rendezvous: Rendezvous | None = None,
    network: NetworkOptions | None = None,
    found: Callable[[Finding], None] = lambda _: None,
) -> list[Finding]:
    """Examine a place, and this machine, for a job that is to checkpoint there.

    Objects with hidden names are put below the URI, and deleted at the end in any case.

    Args:
        target: the URI of the run, with the options that the job will have.
        state_size: bytes of a rank's state, to compare memory with.
        ranks: of the job on this machine.
        rendezvous: where the job's ranks meet, each of which examines its host. Rank 0 alone tries the place.
        network: the job's interface and ports.
        found: called with each finding as it is made.

    Raises:
        ConfigurationError: an option can't be used, or a library is missing.
    """
    findings: list[Finding] = []

    def say(finding: Finding) -> None:
        findings.append(finding)
        found(finding)

    for finding in machine(target.options, state_size, ranks):
        say(finding)
    say(own_name())
    if rendezvous is None:
        say(not_tried())
    else:
        for finding in ranks_meet(rendezvous, network or NetworkOptions.given(), _MEETING):
            say(finding)
    if rendezvous is None or rendezvous.rank == 0:
        _examine_place(target, say)
    return findings


def _examine_place(target: Target, say: Callable[[Finding], None]) -> None:
    options = target.options
    hasty = {"retries": min(options.retries, _RETRIES), "timeout": min(options.timeout, _TIMEOUT)}
    quick = replace(target, options=options.model_copy(update=hasty))
    with open_store(quick) as store, contextlib.closing(open_exam(quick)) as exam:
        probe_objects = ProbeObjects(store)
        try:
            for finding in _tried(Tries(store, exam, probe_objects), exam):
                say(finding)
        finally:
            untouched = probe_objects.is_empty
            left = probe_objects.clear()
        if not untouched:
            say(_leftovers(left))


def _tried(tries: Tries, exam: Exam) -> Iterator[Finding]:
    goes_on = yield from exam.reach()
    if not goes_on:
        yield Finding(
            "the rest", "skipped", "no operation, and no setting, can be tried before this is right"
        )
        return
    yield from tries.small()
    yield from tries.large()
    try:
        yield from exam.settings(tries.example, gc_aborts=tries.gc_aborts)
    except ConfigurationError:
        raise
    except CheckpointError as error:
        yield Finding("settings", "unknown", error.message, error.hint or "")
    yield from tries.deletion()


def _leftovers(left: tuple[str, ...]) -> Finding:
    if not left:
        return Finding("clean-up", "ok", "nothing is left of these tries")
    what = f"could not be deleted: {', '.join(left)}"
    return Finding("clean-up", "failed", what, "Run `cloudckpt gc` once the permission is there")
