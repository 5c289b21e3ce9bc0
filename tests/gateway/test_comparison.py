"""The comparison window's figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8qa.contract import Precision
from int8qa.gateway import schemas
from int8qa.gateway.comparison import (
    HISTOGRAM_BINS,
    HISTOGRAM_EDGES_S,
    ComparisonWindow,
    Pair,
    PairedAnswer,
    Single,
    summarize,
)
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
        window.add(Pair(int8_s=int8_s, fp16_s=fp16_s, agreed=int8_s < 1))
    report = window.report_pairs()
    assert report.speedup == pytest.approx(3.0)
    assert report.agreement == pytest.approx(2 / 3)


def test_disturbed_pairs_count_for_agreement_alone():
    """A latency that somebody else's batch stretched says nothing about a precision."""
    window = ComparisonWindow(10, list(Precision))
    window.add(Pair(int8_s=0.01, fp16_s=0.03, agreed=True))
    window.add(Pair(int8_s=9.0, fp16_s=0.03, agreed=False, undisturbed=False))
    report = window.report_pairs()
    assert (report.count, report.agreement) == (2, 0.5)
    assert (report.int8.count, report.int8.p99_s) == (1, 0.01)
    assert report.speedup == pytest.approx(3.0)
    assert sum(window.count_latencies()[Precision.INT8]) == 1


@given(LATENCIES)
def test_histogram_counts_each_pair_in_its_bin(seconds: list[float]):
    """Bins are half-open; what lies outside all of them is in the outer ones."""
    window = ComparisonWindow(300, list(Precision))
    for value in seconds:
        window.add(Pair(int8_s=value, fp16_s=1.0, agreed=True))
    edges = HISTOGRAM_EDGES_S
    for index, count in enumerate(window.count_latencies()[Precision.INT8]):
        low = edges[index] if index else 0.0
        high = edges[index + 1] if index + 1 < HISTOGRAM_BINS else float("inf")
        assert count == sum(low <= value < high for value in seconds)


def test_disagreements_come_most_convinced_first():
    """Two sure answers that differ are worth a look; a doubtful one is not."""
    window = ComparisonWindow(100, list(Precision))
    for index in range(20):
        sure = PairedAnswer(0, 5, score=index / 20)
        other = PairedAnswer(9, 12, score=0.9)
        pair = Pair(1, 1, agreed=False, int8=sure, fp16=other, request_id=f"r{index}")
        window.add(pair)
    window.add(Pair(1, 1, agreed=False, int8=None, fp16=PairedAnswer(1, 2, 0.99)))
    window.add(Pair(1, 1, agreed=True, int8=PairedAnswer(1, 2, 0.99)))
    ids = [pair.request_id for pair in window.list_disagreements()]
    # r18 and r19 tie: their less sure side is the same 0.9.
    assert ids == ["r18", "r19", *(f"r{index}" for index in range(17, 9, -1))]


def test_window_forgets_the_oldest():
    """Only the most recent observations count."""
    window = ComparisonWindow(3, [Precision.INT8])
    for seconds in (9.0, 1.0, 2.0, 3.0):
        window.add(Single(Precision.INT8, seconds))
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
