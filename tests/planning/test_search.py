"""The search finds the rate that queueing theory names."""

from __future__ import annotations

import math

import pytest

from int8qa.planning import search
from int8qa.planning.search import JOINT_REPLICAS, predict_fewest, search_limit
from int8qa.planning.traffic import Question
from tests.planning.conftest import make_service
from tests.planning.test_simulation import (
    MEAN_S,
    list_exponential,
    make_single_server,
)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulations of which only the mechanics are looked at."""
    monkeypatch.setattr(search, "COUNT", 800)
    monkeypatch.setattr(search, "WARM_UP", 100)


def test_limit_of_mm1(monkeypatch: pytest.MonkeyPatch) -> None:
    """p99 = ln 100 / (μ-λ) keeps to a bound up to λ = μ - ln 100 / bound."""
    monkeypatch.setattr(search, "COUNT", 4000)
    monkeypatch.setattr(search, "WARM_UP", 300)
    service, questions = make_single_server(list_exponential())
    bound_s = 0.12
    limit = 1 / MEAN_S - math.log(100) / bound_s
    found = search_limit(service, questions, 1e3 * bound_s, 1 / MEAN_S)
    assert found.limit_qps is not None
    # The upper end of the interval must keep to it, so the rate is on the safe side.
    assert 0.8 * limit < found.limit_qps < 1.05 * limit
    assert found.count_replicas(10 * found.limit_qps) == 10
    assert found.count_replicas(10.01 * found.limit_qps) == 11
    assert found.count_replicas(0.1) == 1
    rates = [prediction.rate_qps for prediction in found.tried]
    assert rates == sorted(rates)


@pytest.mark.usefixtures("short")
def test_unreachable_bound(mixed: tuple[Question, ...]) -> None:
    """Below what a lone question takes no number of replicas helps, and none is said."""
    service = make_service()
    found = search_limit(service, mixed, 15.0, 60.0)
    assert found.limit_qps is None
    assert found.count_replicas(1.0) is None
    assert found.lone.p99.ms > 15
    assert predict_fewest(service, mixed, 10.0, found, 15.0) is None


@pytest.mark.usefixtures("short")
def test_fewest_replicas_keep_the_bound(mixed: tuple[Question, ...]) -> None:
    """Simulated together while they are few; beyond that one stands for all."""
    service = make_service()
    found = search_limit(service, mixed, 120.0, 90.0)
    assert found.limit_qps is not None
    few, many = (
        predict_fewest(service, mixed, share * found.limit_qps, found, 120.0)
        for share in (2.5, 500.0)
    )
    assert few is not None
    assert many is not None
    assert 3 <= few.replicas <= JOINT_REPLICAS
    assert not few.extrapolated
    assert 500 <= many.replicas <= 520
    assert many.extrapolated
    for prediction in (few, many):
        assert prediction.p99.upper_ms <= 120
        assert prediction.p50.ms < prediction.p95.ms < prediction.p99.ms
        assert prediction.p99.low_ms <= prediction.p99.ms <= prediction.p99.high_ms


@pytest.mark.usefixtures("short")
def test_equal_seeds_equal_searches(mixed: tuple[Question, ...]) -> None:
    """Common random numbers: a service twice as fast has exactly twice the limit."""
    slow, fast = (
        search_limit(
            make_service(max_wait_s=0.008 / speed, speed=speed),
            mixed,
            160.0 / speed,
            80.0 * speed,
        )
        for speed in (1, 2)
    )
    assert slow.limit_qps is not None
    assert fast.limit_qps == pytest.approx(2 * slow.limit_qps)
