"""The comparison window's figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8qa.contract import Precision
from int8qa.gateway import schemas
from int8qa.gateway.comparison import ComparisonWindow, summarize
from tests.gateway.fakes import Service

LATENCIES = st.lists(st.floats(1e-4, 60), min_size=1, max_size=300)


def test_empty_window_has_no_figures():
    """Before the first pair there is nothing to divide."""
    window = ComparisonWindow(10, list(Precision))
    report = window.report_pairs()
    assert (report.count, report.speedup, report.agreement) == (0, None, None)
    assert report.int8.p50_s is None


def test_speedup_is_the_median_of_ratios():
    """One long document does not outweigh the others."""
    window = ComparisonWindow(10, list(Precision))
    for int8_s, fp16_s in ((0.01, 0.03), (0.01, 0.04), (10.0, 11.0)):
        window.add_pair(int8_s=int8_s, fp16_s=fp16_s, agreed=int8_s < 1)
    report = window.report_pairs()
    assert report.speedup == pytest.approx(3.0)
    assert report.agreement == pytest.approx(2 / 3)


def test_window_forgets_the_oldest():
    """Only the most recent observations count."""
    window = ComparisonWindow(3, [Precision.INT8])
    for seconds in (9.0, 1.0, 2.0, 3.0):
        window.add_single(Precision.INT8, seconds)
    summary = window.report_singles()[Precision.INT8]
    assert (summary.count, summary.p50_s, summary.p99_s) == (3, 2.0, 3.0)


@given(LATENCIES)
def test_percentiles_have_their_share_at_or_below(seconds: list[float]):
    """Nearest rank: the smallest seen value with at least that share at or below."""
    summary = summarize(seconds)
    for percent, value in (
        (50, summary.p50_s),
        (95, summary.p95_s),
        (99, summary.p99_s),
    ):
        assert value in seconds
        assert sum(s <= value for s in seconds) * 100 >= percent * len(seconds)
        assert sum(s < value for s in seconds) * 100 < percent * len(seconds)


async def test_report_over_http(service: Service):
    """Pairs and singles are counted apart; `both` feeds either."""
    for precision in ("int8", "int8", "both", "both", "both"):
        assert (await service.ask(precision=precision)).status_code == 200
    body = (await service.client.get("/v1/comparison")).json()
    schemas.ComparisonReport.model_validate(body)
    assert body["count"] == body["int8"]["count"] == body["fp16"]["count"] == 3
    assert body["agreement"] == 1.0
    assert body["speedup"] > 0
    assert {p: s["count"] for p, s in body["unpaired"].items()} == {
        "int8": 5,
        "fp16": 3,
        "fp32": 0,
    }
