"""The metrics of the contract, after real traffic."""

from __future__ import annotations

import math

from prometheus_client.parser import text_string_to_metric_families

from int8qa.contract import Precision
from tests.gateway.fakes import CONTEXT, QUESTION, Service, open_service

CONTRACT = {
    "int8qa_request_seconds": ("histogram", {"route", "precision", "outcome"}),
    "int8qa_stage_seconds": ("histogram", {"stage", "precision"}),
    "int8qa_batch_windows": ("histogram", {"precision"}),
    "int8qa_batch_padding_ratio": ("histogram", {"precision"}),
    "int8qa_queue_windows": ("gauge", set()),
    "int8qa_inflight_requests": ("gauge", set()),
    "int8qa_rejected": ("counter", {"reason"}),
    "int8qa_comparisons": ("counter", {"agreement"}),
    "int8qa_comparison_latency_seconds": ("histogram", {"precision"}),
    "int8qa_comparison_speedup_ratio": ("gauge", set()),
    "int8qa_batch_tokens": ("counter", {"precision"}),
    "int8qa_batch_padding_tokens": ("counter", {"precision"}),
    "int8qa_comparison_agreement_ratio": ("gauge", set()),
    "int8qa_comparison_score_deviation": ("histogram", set()),
    "int8qa_comparison_skipped": ("counter", {"reason"}),
    "int8qa_comparison_disturbed": ("counter", set()),
    "int8qa_comparison_busy_seconds": ("counter", set()),
    "int8qa_serving_precision": ("gauge", {"precision"}),
    "int8qa_diversions": ("counter", {"to"}),
    "int8qa_guard_tripped": ("gauge", set()),
    "int8qa_guard_switches": ("counter", {"to"}),
    "int8qa_guard_agreement_threshold": ("gauge", set()),
    "int8qa_model_info": (
        "gauge",
        {"precision", "engine", "checkpoint", "calibrator", "recipe"},
    ),
    "int8qa_model_f1": ("gauge", {"precision"}),
}


async def test_every_metric_of_the_contract_is_there(service: Service):
    """Names, types and labels are those that dashboards rely on."""
    await service.ask(precision="both")
    text = (await service.client.get("/metrics")).text
    families = {f.name: f for f in text_string_to_metric_families(text)}
    for name, (kind, labels) in CONTRACT.items():
        family = families[name]
        assert family.type == kind, name
        seen = {label for sample in family.samples for label in sample.labels}
        assert seen - {"le"} == labels, name
    assert "process_resident_memory_bytes" in families


async def test_figures_are_sane_after_traffic(service: Service):
    """Counts match what was asked, and nothing is left in flight or queued."""
    for precision in ("int8", "int8", "fp16", "both"):
        await service.ask(precision=precision)
    await service.ask(top_k=0)
    items = [{"question": QUESTION, "context": CONTEXT}] * 3
    await service.client.post("/v1/answers", json={"items": items})
    metrics = await service.read_metrics()

    def count(name: str, **labels: str) -> float:
        inner = ",".join(f'{key}="{value}"' for key, value in labels.items())
        return metrics[f"{name}{{{inner}}}"]

    requests = "int8qa_request_seconds_count"
    for precision, expected in (("int8", 2), ("fp16", 1), ("both", 1)):
        labels = {"outcome": "ok", "precision": precision, "route": "/v1/answer"}
        assert count(requests, **labels) == expected
    refused = {"outcome": "invalid", "precision": "none", "route": "/v1/answer"}
    assert count(requests, **refused) == 1
    batch = {"outcome": "ok", "precision": "none", "route": "/v1/answers"}
    assert count(requests, **batch) == 1
    for stage in ("tokenize", "queue", "inference", "decode"):
        labels = {"precision": "int8", "stage": stage}
        assert count("int8qa_stage_seconds_count", **labels) == 6
        labels["precision"] = "fp16"
        assert count("int8qa_stage_seconds_count", **labels) == 2
    assert count("int8qa_comparisons_total", agreement="same") == 1
    assert count("int8qa_comparison_latency_seconds_count", precision="int8") == 1
    assert count("int8qa_rejected_total", reason="invalid") == 1
    assert count("int8qa_batch_windows_sum", precision="int8") == 6
    assert count("int8qa_model_f1", precision="int8") == 80.5
    assert count("int8qa_model_ready", precision="fp32") == 1
    assert metrics["int8qa_inflight_requests"] == 0
    assert metrics["int8qa_queue_windows"] == 0
    assert metrics["int8qa_comparison_speedup_ratio"] > 0
    ratio = count("int8qa_batch_padding_ratio_sum", precision="int8")
    assert 0 <= ratio < count("int8qa_batch_padding_ratio_count", precision="int8")


async def test_route_labels_are_templates(service: Service):
    """Paths with parameters count under their template, unknown ones under `other`."""
    for path in ("/x", "/y/z", "/v2/answer"):
        await service.client.get(path)
    await service.client.post("/models/a/b", json={})
    await service.client.get("/docs")
    text = (await service.client.get("/metrics")).text
    (family,) = [
        f
        for f in text_string_to_metric_families(text)
        if f.name == "int8qa_request_seconds"
    ]
    assert {sample.labels["route"] for sample in family.samples} == {
        *("other", "/models/{model_id:path}", "/docs"),
    }


async def test_speedup_is_nan_without_pairs(service: Service):
    """No pair, no ratio: NaN rather than an invented figure."""
    metrics = await service.read_metrics()
    assert math.isnan(metrics["int8qa_comparison_speedup_ratio"])


async def test_applications_do_not_share_metrics(tokenizer):
    """Each application counts its own."""
    async with open_service(tokenizer) as first, open_service(tokenizer) as second:
        await first.ask()
        name = 'int8qa_batch_windows_sum{precision="int8"}'
        assert (await first.read_metrics())[name] == 1
        assert (await second.read_metrics())[name] == 0


async def test_tritons_are_counted_by_build(service: Service):
    """Of several Tritons: how many serve; forgotten with the build they serve."""
    gateway = service.app.state.gateway
    gateway.telemetry.count_tritons(Precision.INT8, 2, 1)
    metrics = await service.read_metrics()
    assert metrics['int8qa_tritons{precision="int8",state="serving"}'] == 2
    assert metrics['int8qa_tritons{precision="int8",state="left_out"}'] == 1
    gateway.telemetry.show_contract(gateway.contract)
    assert not any(
        name.startswith("int8qa_tritons") for name in await service.read_metrics()
    )
