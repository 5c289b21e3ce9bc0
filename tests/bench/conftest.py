"""A question file, rules for tests of a second, and a result to draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from int8qa.bench.scenarios import Rules

QUESTIONS = 9
SHORT = Rules(min_seconds=0.3, min_queries=80, bound_ms=5000.0, percentile=0.5)
"""Any machine keeps to these, however busy."""


@pytest.fixture
def question_file(tmp_path: Path) -> Path:
    """A SQuAD-format file."""
    paragraphs = []
    for number in range(QUESTIONS):
        context = f"The key to room {number} hangs behind the bar."
        start = context.index("behind")
        paragraphs.append(
            {
                "context": context,
                "qas": [
                    {
                        "id": f"q{number}",
                        "question": f"Where is the key to room {number}?",
                        "answers": [{"text": "behind the bar", "answer_start": start}],
                    }
                ],
            }
        )
    path = tmp_path / "questions.json"
    document = {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}
    path.write_text(json.dumps(document))
    return path


def make_run(scenario: str, precision: str, **changes: Any) -> dict[str, Any]:
    """One test as a result holds it; INT8 is twice as fast as FP16."""
    slow = {"int8": 1.0, "fp16": 2.0, "fp32": 3.0}[precision]
    offline = scenario == "Offline"
    rate = 80.0 / slow
    return {
        "scenario": scenario,
        "precision": precision,
        "target_qps": None if scenario == "SingleStream" else 0.7 * rate,
        "valid": True,
        "reasons": [],
        "failures": {},
        "queries": 4200,
        "warm_up_qps": rate,
        "throughput_qps": rate if offline else 0.7 * rate,
        "latency_ms": None
        if offline
        else {
            name: value * slow
            for name, value in {
                "mean": 15.0,
                "p50": 14.0,
                "p90": 20.0,
                "p95": 22.0,
                "p99": 30.0,
                "p99_9": 40.0,
                "max": 55.0,
            }.items()
        },
        "cdf_ms": None if offline else [slow * (10 + 0.2 * i) for i in range(103)],
        "by_length": [],
        "time_ms": {
            "tokenize": 0.3,
            "queue": 1.0,
            "inference": 12.0 * slow,
            "decode": 0.1,
            "edge": 0.6,
            "wire": 0.4,
        }
        | ({} if offline else {"generator": 0.1}),
        "gateway": {
            "requests": 4200,
            "request_ms": 14.0 * slow,
            "stages_ms": {},
            "batches": 1000,
            "batch_windows": 4.2,
            "fill": {"1": 200, "4": 300, "8": 500},
            "padding_share": 0.08,
            "cpu_ms": 0.9,
            "replays": 0,
            "edge_ms": 0.6,
        },
        "generator": {
            "cpu_ms": 0.2,
            "request_ms": 14.5 * slow,
            "lag_ms_p99": None if offline else 0.2,
        },
        "files": f"loadgen/{scenario}-{precision}",
    } | changes


@pytest.fixture
def result() -> dict[str, Any]:
    """Of `bench gateway`, in INT8 and FP16, with one rate too many."""
    runs = [
        make_run(scenario, precision)
        for scenario in ("SingleStream", "Offline", "Server")
        for precision in ("int8", "fp16")
    ]
    runs.append(
        make_run(
            "Server",
            "int8",
            target_qps=76.0,
            valid=False,
            reasons=["3 × HTTP 503"],
            failures={"HTTP 503": 3},
        )
    )
    latency = runs[0]["latency_ms"]
    return {
        "format_version": 1,
        "kind": "gateway",
        "provenance": {
            "command": "int8qa bench gateway",
            "started_at": "2026-11-23T12:00:00Z",
            "machine": {
                "processor": "Abacus 9000",
                "cores": 2,
                "core_numbers": [0, 1],
                "memory_gb": 24,
                "features": ["avx512_vnni"],
                "system": "Linux 6",
                "load_before": 0.1,
            },
            "versions": {"int8qa": "0", "mlcommons-loadgen": "6.0.17"},
            "data": "questions.json",
            "questions": QUESTIONS,
            "loadgen": "6.0.17",
        },
        "gateway": {
            "url": "http://127.0.0.1:8080",
            "checkpoint": "acme/reader",
            "build_id": "b1",
            "precisions": ["int8", "fp16"],
            "models": [],
        },
        "rules": {
            "min_seconds": 60.0,
            "min_queries": 664,
            "bound_ms": 130.0,
            "percentile": 0.99,
            "tolerance": 0.05,
            "concurrency": 32,
        },
        "headline": [
            {
                "precision": precision,
                "single_stream_ms": {k: v * slow for k, v in latency.items()},
                "offline_qps": 80.0 / slow,
                "server_qps": 56.0 / slow,
                "server_ms": {k: v * slow for k, v in latency.items()},
            }
            for precision, slow in (("int8", 1.0), ("fp16", 2.0))
        ],
        "runs": runs,
        "remarks": ["Server-int8: others asked this gateway 3 questions meanwhile"],
        "problems": [],
    }
