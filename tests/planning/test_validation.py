"""Predictions beside measurements: the error as it is, and why a test is left out."""

from __future__ import annotations

from typing import Any

import pytest

from int8qa.planning.search import predict
from int8qa.planning.traffic import Question
from int8qa.planning.validation import validate, write_verdict
from tests.bench.conftest import make_run
from tests.planning.conftest import make_service


def measure(rate: float, p50: float, p99: float, **changes: Any) -> dict[str, Any]:
    return make_run(
        "Server",
        "int8",
        target_qps=rate,
        queries=900,
        latency_ms={"p50": p50, "p99": p99},
        **changes,
    )


def test_errors_are_relative_to_the_measurement(mixed: tuple[Question, ...]) -> None:
    """Rows by rate; the spread is what chance does to a test of that length."""
    service = make_service()
    truth = predict(service, mixed, 40.0, count=900)
    runs = [
        measure(40.0, truth.p50.ms, truth.p99.ms / 1.25),
        measure(20.0, 1000.0, 1000.0),
        make_run("Offline", "int8"),
        make_run("Server", "fp32"),
        measure(5.0, 1.0, 1.0, light=True),
    ]
    first, second = validate(runs, {"int8": service}, mixed)
    assert (first["rate_qps"], second["rate_qps"]) == (20.0, 40.0)
    assert second["p50"]["error"] == 0
    assert second["p99"]["error"] == pytest.approx(0.25, abs=1e-3)
    assert second["p99"]["predicted_ms"] == pytest.approx(truth.p99.ms, abs=1e-3)
    low, high = second["p99"]["spread_ms"]
    assert low < truth.p99.ms < high
    assert first["p99"]["error"] < -0.9
    verdict = write_verdict([second])
    assert "1 Server tests" in verdict
    assert "+25.0 %" in verdict


def test_what_cannot_be_compared_says_why(mixed: tuple[Question, ...]) -> None:
    """A queue without end, and tests with failures."""
    runs = [
        measure(500.0, 900.0, 2000.0),
        measure(10.0, 5.0, 9.0, failures={"HTTP 503": 1}),
    ]
    failed, saturated = validate(runs, {"int8": make_service()}, mixed)
    assert "failed" in failed["skipped"]
    assert "saturated" in saturated["skipped"]
    assert "Not validated" in write_verdict([failed, saturated])
