"""The bridge to OpenTelemetry, with its real SDK: what is told of saves and loads as spans and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

import cloudckpt
from cloudckpt.telemetry import OpenTelemetry
from support.places import Place


class Told:
    """A bridge, and what came across."""

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self._metrics = InMemoryMetricReader()
        self._tracing = TracerProvider()
        self._tracing.add_span_processor(SimpleSpanProcessor(self._spans))
        self._metering = MeterProvider([self._metrics])
        self.bridge = OpenTelemetry(self._tracing, self._metering)

    @property
    def spans(self) -> list[Any]:
        return list(self._spans.get_finished_spans())

    def metrics(self) -> dict[str, list[Any]]:
        data = self._metrics.get_metrics_data()
        assert data is not None
        return {
            metric.name: list(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def close(self) -> None:
        self._tracing.shutdown()
        self._metering.shutdown()


@pytest.fixture
def told() -> Iterator[Told]:
    one = Told()
    yield one
    one.close()


def test_saves_and_loads_are_spans_and_metrics(folder: Place, told: Told) -> None:
    state = {"t": torch.ones(1000)}
    with cloudckpt.Checkpointer(folder.uri, keep_last=1, on_event=told.bridge) as checkpointer:
        infos = [checkpointer.save(step, state) for step in (1, 2)]
        checkpointer.load(state)
    saves = [span for span in told.spans if span.name == "checkpoint.save"]
    (load,) = [span for span in told.spans if span.name == "checkpoint.load"]
    for info, span in zip(infos, saves, strict=True):
        assert dict(span.attributes) == {
            "checkpoint.step": info.step,
            "checkpoint.uri": info.uri,
            "checkpoint.size": info.size,
            "rank": 0,
        }
        assert [event.name for event in span.events] == ["staged", "planned", "uploaded"]
        assert span.status.status_code is StatusCode.OK
        # It began with the call, before the first event.
        assert span.start_time < span.events[0].timestamp < span.end_time
    assert load.attributes is not None and load.attributes["checkpoint.step"] == 2
    assert load.end_time > load.start_time
    metrics = told.metrics()
    assert {name: len(points) for name, points in metrics.items()} == dict.fromkeys(metrics, 1)
    assert {name: point.count for name, (point,) in metrics.items() if "duration" in name} == {
        "checkpoint.save.duration": 2,
        "checkpoint.load.duration": 1,
    }
    assert metrics["checkpoint.save.blocked"][0].count == 2
    assert metrics["checkpoint.save.size"][0].value >= 2 * 4000
    assert metrics["checkpoint.steps.pruned"][0].value == 1
    (ended,) = metrics["checkpoint.saves"]
    assert (ended.value, dict(ended.attributes)) == (2, {"rank": 0, "outcome": "committed"})


def test_a_save_that_failed_is_a_span_with_the_error(folder: Place, told: Told) -> None:
    state = {"t": torch.ones(10)}
    with cloudckpt.Checkpointer(folder.uri, on_event=told.bridge, on_failure="warn") as checkpointer:
        checkpointer.save(1, state)
        checkpointer.async_save(1, state)
    failed = told.spans[-1]
    assert (
        failed.status.status_code is StatusCode.ERROR
        and "committed here already" in failed.status.description
    )
    (exception,) = [event for event in failed.events if event.name == "exception"]
    assert exception.attributes["exception.type"].endswith("CheckpointExistsError")
    outcomes = {point.attributes["outcome"]: point.value for point in told.metrics()["checkpoint.saves"]}
    assert outcomes == {"committed": 1, "failed": 1}
