"""Rules and boards over two gateways and two Tritons: what all of them did together.

The traffic is uneven. A mean of two gateways' ratios or percentiles would show.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.observability.expressions import EXPRESSIONS, RULES
from tests.observability.test_rules import needs_promtool, run_promtool

ANSWERS = 'route="/v1/answer",precision="int8",outcome="ok"'
STAGE = 'stage="inference",precision="int8"'
MODEL = 'model="qa_int8",version="1"'

GATEWAYS = {
    # Nine tenths of the answers are one gateway's and take 10 ms, the rest 20 to 30.
    f'int8qa_request_seconds_bucket{{{ANSWERS},le="0.01"}}': (9, 0),
    f'int8qa_request_seconds_bucket{{{ANSWERS},le="0.02"}}': (9, 0),
    f'int8qa_request_seconds_bucket{{{ANSWERS},le="0.03"}}': (9, 1),
    f'int8qa_request_seconds_bucket{{{ANSWERS},le="+Inf"}}': (9, 1),
    f"int8qa_request_seconds_count{{{ANSWERS}}}": (9, 1),
    # Every failure is the other's.
    'int8qa_request_seconds_count{route="/v1/answer",precision="none",'
    'outcome="unavailable"}': (0, 2.5),
    f"int8qa_stage_seconds_sum{{{STAGE}}}": (0.9, 1.1),
    f"int8qa_stage_seconds_count{{{STAGE}}}": (9, 1),
    'int8qa_batch_windows_sum{precision="int8"}': (40, 2),
    'int8qa_batch_windows_count{precision="int8"}': (10, 4),
    'int8qa_comparisons_total{agreement="same"}': (9, 0),
    'int8qa_comparisons_total{agreement="different"}': (0, 1),
}
"""What each of two gateways counts in 5 s."""

TRITONS = {
    f"nv_inference_request_success{{{MODEL}}}": (10, 30),
    f"nv_inference_queue_duration_us{{{MODEL}}}": (1e6, 9e6),
    f"nv_inference_count{{{MODEL}}}": (20, 100),
    f"nv_inference_exec_count{{{MODEL}}}": (10, 5),
}
"""What each of two Tritons counts in 5 s."""

GAUGES = {
    'int8qa_queue_windows{job="gateway",instance="g:1",precision="int8"}': 5,
    'int8qa_queue_windows{job="gateway",instance="g:2",precision="int8"}': 7,
    f'nv_inference_pending_request_count{{job="triton",instance="t:1",{MODEL}}}': 3,
    f'nv_inference_pending_request_count{{job="triton",instance="t:2",{MODEL}}}': 4,
}

EXPECTED = {
    "job_precision:int8qa_request_seconds:p50_rate5m": (
        '{job="gateway",precision="int8"}',
        0.01 * 5 / 9,
    ),
    "job_precision:int8qa_request_seconds:p99_rate5m": (
        '{job="gateway",precision="int8"}',
        0.029,
    ),
    "operations: Latency of single questions B": ("{}", 0.025),
    "operations: Latency of single questions C": ("{}", 0.029),
    "int8-against-fp16: p99 of requests A": ('{precision="int8"}', 0.029),
    "operations: Questions A": ("{}", 2.5),
    "operations: Availability, 1 h A": ("{}", 0.8),
    "job:int8qa_requests:error_ratio_rate5m": ('{job="gateway"}', 0.2),
    "operations: INT8: mean time by stage A": ('{stage="inference"}', 0.2),
    "operations: Batch fill A": ('{precision="int8"}', 3.0),
    "operations: Queue and requests in flight A": ("{}", 12.0),
    "int8-against-fp16: Agreement and threshold A": ("{}", 0.9),
    "operations: qa_int8: mean time in Triton A": ("{}", 0.25),
    "job_model:nv_inference_batch_windows:mean_rate5m": (
        '{job="triton",model="qa_int8"}',
        8.0,
    ),
    "operations: Executions and windows B": ('{model="qa_int8"}', 24.0),
    "operations: Pending in Triton A": ('{model="qa_int8"}', 7.0),
}
"""A rule's name, or a panel's place, to the labels and the value it gives."""

PROMQL = {one.place: one.promql for one in EXPRESSIONS if one.kind == "panel"} | {
    one.place: one.place for one in EXPRESSIONS if one.kind == "record"
}


def list_series() -> list[dict[str, str]]:
    """Ten minutes of it, as promtool writes series."""
    series = [{"series": name, "values": f"{n}x240"} for name, n in GAUGES.items()]
    for job, counters in (("gateway", GATEWAYS), ("triton", TRITONS)):
        for name, each in counters.items():
            for number, step in enumerate(each, 1):
                scraped = f'{{job="{job}",instance="{job[0]}:{number}",'
                series.append(
                    {
                        "series": name.replace("{", scraped, 1),
                        "values": f"0+{step:g}x240",
                    }
                )
    return series


@needs_promtool
def test_two_gateways_count_as_one_service(tmp_path: Path):
    """Each figure is of all requests together, and names no gateway."""
    test = {
        "rule_files": [str(path) for path in RULES],
        "evaluation_interval": "5s",
        "tests": [
            {
                "interval": "5s",
                "input_series": list_series(),
                "promql_expr_test": [
                    {
                        "expr": f"round({PROMQL[place]}, 0.000001)",
                        "eval_time": "10m",
                        "exp_samples": [{"labels": labels, "value": round(value, 6)}],
                    }
                    for place, (labels, value) in EXPECTED.items()
                ],
            }
        ],
    }
    path = tmp_path / "several.yml"
    path.write_text(yaml.safe_dump(test), "utf-8")
    run_promtool("test", "rules", path)
