"""Spans and metrics of OpenTelemetry for a run's checkpoints. They take the extra ``otel``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cloudckpt.backends.config.libraries import install_hint
from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.version import __version__
from cloudckpt.events import Committed, Event, Failed, Loaded, Planned, Pruned, Staged, Uploaded

try:
    from opentelemetry import metrics, trace
    from opentelemetry.trace import Span, Status, StatusCode
except ModuleNotFoundError as error:  # pragma: no cover - the extra is installed where tests run
    raise ConfigurationError(
        "telemetry takes OpenTelemetry, which is not installed",
        hint=install_hint("otel", "opentelemetry-api"),
    ) from error

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

_NAME = "cloudckpt"


class OpenTelemetry:
    """An ``on_event`` of a Checkpointer's: ``Checkpointer(uri, on_event=OpenTelemetry())``.

    Each save is a span ``checkpoint.save``, from the snapshot's beginning to the commit or the failure, with
    an event for each step on the way; each load is a span ``checkpoint.load``. Metrics, with the unit: the
    histograms ``checkpoint.save.blocked`` (s), ``checkpoint.save.duration`` (s) and
    ``checkpoint.load.duration`` (s), and the counters ``checkpoint.save.size`` (By, of this rank),
    ``checkpoint.saves`` by ``outcome``, and ``checkpoint.steps.pruned``. Each has the ``rank``.

    Args:
        tracer_provider: by default the global one.
        meter_provider: by default the global one.
    """

    def __init__(
        self, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        self._tracer = trace.get_tracer(_NAME, __version__, tracer_provider)
        meter = metrics.get_meter(_NAME, __version__, meter_provider)
        self._blocked = meter.create_histogram(
            "checkpoint.save.blocked", "s", "How long training waited for a snapshot"
        )
        self._saving = meter.create_histogram(
            "checkpoint.save.duration", "s", "From the call that saved to the commit"
        )
        self._loading = meter.create_histogram("checkpoint.load.duration", "s", "How long a load took")
        self._size = meter.create_counter("checkpoint.save.size", "By", "Bytes that this rank stored")
        self._saves = meter.create_counter("checkpoint.saves", "{save}", "Saves that ended")
        self._pruned = meter.create_counter("checkpoint.steps.pruned", "{step}", "Steps that were deleted")
        self._spans: dict[tuple[str, int], Span] = {}

    def __call__(self, event: Event) -> None:
        """Take an event."""
        rank = {"rank": event.rank}
        match event:
            case Staged():
                self._blocked.record(event.seconds, rank)
                span = self._started("checkpoint.save", event, event.seconds)
                span.add_event("staged")
                self._spans[event.uri, event.rank] = span
            case Planned():
                self._told(event, "planned", event.size)
            case Uploaded():
                self._size.add(event.size, rank)
                self._told(event, "uploaded", event.size)
            case Committed():
                self._saving.record(event.info.seconds, rank)
                self._ended(event, Status(StatusCode.OK), "committed", event.info.size)
            case Failed():
                if (failed := self._spans.get((event.uri, event.rank))) is not None:
                    failed.record_exception(event.error)
                self._ended(event, Status(StatusCode.ERROR, str(event.error)), "failed")
            case Pruned():
                self._pruned.add(len(event.steps), rank)
            case Loaded():
                self._loading.record(event.seconds, rank)
                self._started("checkpoint.load", event, event.seconds).end()
            case _:  # one that is younger than this bridge
                pass

    def _started(self, name: str, event: Event, seconds: float) -> Span:
        """Return a span that began so many seconds ago."""
        attributes: dict[str, AttributeValue] = {"checkpoint.step": event.step, "checkpoint.uri": event.uri}
        attributes["rank"] = event.rank
        began = time.time_ns() - int(seconds * 1e9)
        return self._tracer.start_span(name, attributes=attributes, start_time=began)

    def _told(self, event: Event, what: str, size: int) -> None:
        if (span := self._spans.get((event.uri, event.rank))) is not None:
            span.add_event(what, {"size": size})

    def _ended(self, event: Event, status: Status, outcome: str, size: int | None = None) -> None:
        self._saves.add(1, {"rank": event.rank, "outcome": outcome})
        if (span := self._spans.pop((event.uri, event.rank), None)) is not None:
            if size is not None:
                span.set_attribute("checkpoint.size", size)
            span.set_status(status)
            span.end()
