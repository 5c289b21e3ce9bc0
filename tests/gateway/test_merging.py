"""Several processes' metrics as those of one."""

from __future__ import annotations

import math

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric

from int8qa.contract import Precision
from int8qa.gateway.comparison import ShadowReport
from int8qa.gateway.merging import (
    GAUGE_RULES,
    MergedRegistry,
    ProcessState,
    merge_metrics,
    merge_states,
)
from int8qa.gateway.telemetry import RequestRecord, Telemetry
from tests.gateway.fakes import build_contract


def collect(telemetry: Telemetry) -> list[Metric]:
    return list(telemetry.registry.collect())


def read(families: list[Metric]) -> dict[str, float]:
    return {
        sample.name + "".join(sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_counters_and_histograms_add_up(tokenizer):
    """Each bucket, sum and count is that of all processes."""
    states = []
    for seconds in (0.004, 0.04, 0.4):
        telemetry = Telemetry(build_contract(tokenizer))
        record = RequestRecord("id", "POST", "/v1/answer", "int8")
        telemetry.observe_request(record, seconds)
        telemetry.count_rejection("queue_full")
        states.append(collect(telemetry))
    merged = read(merge_metrics(states))
    labels = "/v1/answerint8ok"
    assert merged[f"int8qa_request_seconds_count{labels}"] == 3
    assert merged[f"int8qa_request_seconds_sum{labels}"] == pytest.approx(0.444)
    assert merged["int8qa_request_seconds_bucket/v1/answer0.005int8ok"] == 1
    assert merged["int8qa_request_seconds_bucket/v1/answer0.05int8ok"] == 2
    assert merged["int8qa_request_seconds_bucket+Inf/v1/answerint8ok"] == 3
    assert merged["int8qa_rejected_totalqueue_full"] == 3
    single = read(states[0])
    assert single[f"int8qa_request_seconds_count{labels}"] == 1, "left as it was"


def test_gauges_have_rules_of_their_own(tokenizer):
    """Queues add up; what one process lacks is lacking; NaN knows nothing."""
    one, other = (Telemetry(build_contract(tokenizer)) for _ in range(2))
    for telemetry, waiting, ready in ((one, 3, True), (other, 4, False)):
        telemetry.on_queue(Precision.INT8, waiting)
        telemetry.set_inflight(waiting)
        telemetry.set_model_ready(Precision.INT8, ready=ready)
        telemetry.set_key_file(sound=ready)
    one._comparison_agreement_ratio.set(0.75)
    merged = read(merge_metrics([collect(other), collect(one)]))
    assert merged["int8qa_queue_windows"] == 7
    assert merged["int8qa_inflight_requests"] == 7
    assert merged["int8qa_model_readyint8"] == 0
    assert merged["int8qa_key_file_sound"] == 0
    assert merged["int8qa_comparison_agreement_ratio"] == 0.75
    assert math.isnan(merged["int8qa_comparison_speedup_ratio"])
    assert merged["int8qa_model_f1int8"] == 80.5


def test_every_gauge_has_a_rule(tokenizer):
    """A gauge without one could not be merged, and would be noticed in production."""
    families = collect(Telemetry(build_contract(tokenizer)))
    gauges = {family.name for family in families if family.type == "gauge"}
    assert gauges - set(GAUGE_RULES) == set()


def test_who_is_gone_leaves_counts_alone():
    """Nothing of a process that ended waits, or is ready; what it did counts on."""
    registry = CollectorRegistry()
    Gauge("int8qa_queue_windows", "", registry=registry).set(9)
    Counter("asked_total", "", registry=registry).inc(2)
    gone = merge_metrics([list(registry.collect())], gone=True)
    assert read(gone)["asked_total"] == 2
    assert "int8qa_queue_windows" not in read(gone)
    live = list(registry.collect())
    assert read(merge_metrics([live, gone]))["asked_total"] == 4
    assert read(merge_metrics([live, gone]))["int8qa_queue_windows"] == 9


def test_exemplars_and_starts_survive(tokenizer):
    """A bucket shows its latest exemplar; a series is as old as its oldest part."""
    states = []
    for name in ("first", "second"):
        registry = CollectorRegistry()
        deviation = Histogram("deviation", "", buckets=(1.0,), registry=registry)
        deviation.observe(0.5, exemplar={"request_id": name})
        states.append(list(registry.collect()))
    forth, back = (merge_metrics(order) for order in (states, states[::-1]))
    for families in (forth, back):
        registry = MergedRegistry(families)
        text, _ = Telemetry(build_contract(tokenizer)).render(
            "application/openmetrics-text", registry
        )
        assert b'deviation_bucket{le="1.0"} 2.0 # {request_id="second"} 0.5' in text
    created = [read(state)["deviation_created"] for state in states]
    assert read(back)["deviation_created"] == min(created)


def test_replays_add_up_within_a_build():
    """Of another build's, and of the share of time of who is gone, nothing is left."""
    report = ShadowReport(2, 1, {"busy": 3}, 1, 0.02)
    states = [ProcessState(build, [], report) for build in ("new", "new", "old")]
    together = merge_states(states)
    assert together.build_id == "new"
    assert together.shadow == ShadowReport(4, 2, {"busy": 6}, 2, 0.04)
    gone = merge_states(states[:1], gone=True)
    assert gone.shadow == ShadowReport(2, 0, {"busy": 3}, 1, 0.0)
